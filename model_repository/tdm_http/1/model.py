"""Triton model: hands each request to the streaming model over BLS and returns its picture."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import triton_python_backend_utils as pb_utils

MAX_OPEN = 128
"""Most requests that wait for the streaming model at once; further ones queue in Triton."""
FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonPythonModel:
    """A thread for each open request; the engine behind them is the streaming model's."""

    def initialize(self, args: dict[str, Any]) -> None:
        """Read which model answers."""
        config = json.loads(args["model_config"])
        self._model = config["parameters"]["model"]["string_value"]
        self._outputs = {output["name"] for output in config["output"]}
        self._threads = ThreadPoolExecutor(MAX_OPEN, thread_name_prefix="requests")

    def execute(self, requests: list[Any]) -> None:
        """Start the requests. Answers come later."""
        for request in requests:
            self._threads.submit(self._forward, request, request.get_response_sender())

    def finalize(self) -> None:
        """Finish the open requests."""
        self._threads.shutdown()

    def _forward(self, request: Any, sender: Any) -> None:
        try:
            answer = self._answer(request)
        except Exception as error:
            answer = pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))
        sender.send(answer, flags=FINAL)

    def _answer(self, request: Any) -> Any:
        inner = pb_utils.InferenceRequest(
            model_name=self._model,
            requested_output_names=[],
            inputs=request.inputs(),
            parameters={"is_from_model": True},  # then errors begin with their code, which BLS loses
        )
        *_, answer = (found for found in inner.exec(decoupled=True) if found.has_error() or found.output_tensors())
        if answer.has_error():
            code, _, message = answer.error().message().partition(": ")
            kind = getattr(pb_utils.TritonError, code, pb_utils.TritonError.INTERNAL)
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(message or code, kind))
        return pb_utils.InferenceResponse(
            [tensor for tensor in answer.output_tensors() if tensor.name() in self._outputs]
        )
