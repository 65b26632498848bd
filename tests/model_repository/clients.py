"""Requests with Triton's own clients."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http

TYPES: Mapping[str, tuple[str, Any]] = {
    "prompt": ("BYTES", np.object_),
    "negative_prompt": ("BYTES", np.object_),
    "seed": ("UINT64", np.uint64),
    "num_inference_steps": ("INT32", np.int32),
    "latency_budget_ms": ("FP32", np.float32),
    "size": ("BYTES", np.object_),
    "guidance_scale": ("FP32", np.float32),
    "prompt_syntax": ("BYTES", np.object_),
    "image": ("BYTES", np.object_),
    "mask": ("BYTES", np.object_),
    "strength": ("FP32", np.float32),
    "num_frames": ("INT32", np.int32),
    "fps": ("INT32", np.int32),
    "output_format": ("BYTES", np.object_),
    "previews": ("BOOL", np.bool_),
    "strict": ("BOOL", np.bool_),
}
ANSWER_TIMEOUT_S = 60.0


def tensors(fields: Mapping[str, Any], client: Any = triton_grpc) -> list[Any]:
    """Return the input tensors of a request, for a module of tritonclient. A list becomes a longer tensor."""
    made = []
    for name, value in fields.items():
        datatype, dtype = TYPES[name]
        values = np.array(value if isinstance(value, list) else [value], dtype=dtype)
        made.append(client.InferInput(name, list(values.shape), datatype))
        made[-1].set_data_from_numpy(values)
    return made


@dataclass
class Answer:
    """All responses to one request."""

    responses: list[dict[str, Any]] = field(default_factory=list)
    """Output name -> value, a number, bytes or pixels; previews first."""
    error: Any = None
    """`InferenceServerException` of a refused or failed request."""

    @property
    def picture(self) -> dict[str, Any]:
        """Outputs of the finished picture."""
        assert self.error is None, self.error
        return self.responses[-1]


class Stream:
    """One ModelStreamInfer call, which carries any number of requests."""

    def __init__(self, client: Any, model: str) -> None:
        self.client = client
        self._model = model
        self._arrived: queue.Queue[tuple[Any, Any]] = queue.Queue()
        self._answers: dict[str, Answer] = {}
        self.unfinished: set[str] = set()
        """Ids of requests whose last response has not been received."""
        client.start_stream(lambda result, error: self._arrived.put((result, error)))

    def send(self, fields: Mapping[str, Any], request_id: str = "only") -> None:
        """Send a request without waiting for its answer."""
        self._answers[request_id] = Answer()
        self.unfinished.add(request_id)
        inputs = tensors(fields)
        self.client.async_stream_infer(self._model, inputs, request_id=request_id, enable_empty_final_response=True)

    def receive(self) -> dict[str, Answer]:
        """Wait for the last response to each request sent. Returns request id -> answer."""
        while self.unfinished:
            result, error = self._arrived.get(timeout=ANSWER_TIMEOUT_S)
            if error is not None:
                assert len(self.unfinished) == 1, (
                    "an error names no request: send one at a time where errors are expected"
                )
                self._answers[self.unfinished.pop()].error = error
                continue
            response = result.get_response()
            if response.outputs:
                self._answers[response.id].responses.append(values_of(result))
            if response.parameters["triton_final_response"].bool_param:
                self.unfinished.remove(response.id)
        return self._answers


def values_of(result: Any) -> dict[str, Any]:
    """Return output name -> value: pixels as an array, all others as one number or bytes."""
    response = result.get_response()
    outputs = response["outputs"] if isinstance(response, dict) else response.outputs
    names = [output["name"] if isinstance(output, dict) else output.name for output in outputs]
    found = {name: result.as_numpy(name) for name in names}
    return {name: value if name.startswith("generated_") else value.item() for name, value in found.items()}


@contextmanager
def stream_to(address: str, model: str = "tdm") -> Iterator[Stream]:
    """Open a stream to a model. At the end it is closed, or cancelled if requests are unfinished."""
    client = triton_grpc.InferenceServerClient(address)
    stream = Stream(client, model)
    try:
        yield stream
    finally:
        client.stop_stream(cancel_requests=bool(stream.unfinished))
        client.close()


def ask(address: str, model: str = "tdm", **fields: Any) -> Answer:
    """Send one request over a stream of its own."""
    with stream_to(address, model) as stream:
        stream.send(fields)
        return stream.receive()["only"]


def ask_http(address: str, model: str = "tdm_http", **fields: Any) -> dict[str, Any]:
    """Send one request over HTTP to a model that does not stream. Returns its outputs."""
    with triton_http.InferenceServerClient(address) as client:
        return values_of(client.infer(model, tensors(fields, triton_http)))
