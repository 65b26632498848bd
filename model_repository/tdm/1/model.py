"""Triton model: every request becomes a sample of one engine, whose calls requests join between steps.

`execute` only submits. Each answer is sent when its picture is there, from a thread beside the engine's.
"""

from __future__ import annotations

import json
import math
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from engine_metrics import EngineMetrics
from order import FILES, PICTURES, Order, read_order
from settings import instance_gpu, load_safety, read_settings, start_engine

from tdm_runtime import (
    CancelledError,
    Delivery,
    InvalidRequestError,
    OverloadedError,
    Picture,
    Preview,
    SamplingParams,
    TDMError,
)
from tdm_runtime.media.made_file import FileFormat, encode_made, frames_of
from tdm_runtime.media.receipt import Receipt, receipt_of
from tdm_runtime.model.decoder import Pixels
from tdm_runtime.model.loaded_model import LoadedModel

POLL_S = 0.01
"""Seconds between two looks at which clients have left, and at the engine's counts. Triton tells only when asked."""
STOP_S = 1.0
"""Seconds to wait for the end of that look: a server that stops may leave a message about metrics unanswered."""
MAX_ENCODERS = 2
"""Threads that read given pictures, and encode and send made ones."""
FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class Answers:
    """Responses of one request. They are made and sent one after the other, in order, whichever thread does it."""

    def __init__(self, senders: ThreadPoolExecutor) -> None:
        self._senders = senders
        self._lock = threading.Lock()
        self._tasks: deque[Callable[[], None]] = deque()
        self._is_running = False

    def add(self, task: Callable[[], None]) -> None:
        """Make and send a response after those added before."""
        with self._lock:
            self._tasks.append(task)
            if self._is_running:
                return
            self._is_running = True
        self._senders.submit(self._run)

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._tasks:
                    self._is_running = False
                    return
                task = self._tasks.popleft()
            try:
                task()
            except Exception as error:  # the responses after it are still owed
                pb_utils.Logger.log_error(f"a response was not sent: {type(error).__name__}: {error}")


class TritonPythonModel:
    """One engine for all requests of an instance."""

    def initialize(self, args: dict[str, Any]) -> None:
        """Load the model that config.pbtxt names and start its engine."""
        try:
            settings = read_settings(json.loads(args["model_config"])["parameters"])
            self._safety = load_safety(settings)
            self._engine = start_engine(settings, instance_gpu(args))
        except (TDMError, ValueError, OSError) as error:
            raise pb_utils.TritonModelException(str(error)) from error
        model, version = args["model_name"], args["model_version"]
        self._metrics = EngineMetrics(self._engine, {"model": model, "version": version})
        self._metrics.update()
        self._senders = ThreadPoolExecutor(MAX_ENCODERS, thread_name_prefix="answers")
        self._live: dict[Future[Picture], Any] = {}
        """Pictures in the making, each with the sender of its request."""
        self._wake = threading.Condition()
        self._is_closing = False
        self._watch = threading.Thread(target=self._watch_requests, name="requests", daemon=True)
        self._watch.start()

    def execute(self, requests: list[Any]) -> None:
        """Submit requests to the engine. Answers come later."""
        for request in requests:
            begin = partial(self._begin, request, request.get_response_sender())
            if any(tensor.name() in FILES for tensor in request.inputs()):
                self._senders.submit(begin)  # a given picture takes long to decode
            else:
                begin()

    def finalize(self) -> None:
        """Stop. Triton calls this after the last answer."""
        with self._wake:
            self._is_closing = True
            self._wake.notify()
        self._watch.join(STOP_S)
        self._engine.close()
        self._senders.shutdown()

    def _begin(self, request: Any, sender: Any) -> None:
        """Submit a request, or send why it cannot be made."""
        try:
            self._submit(request, sender)
        except Exception as error:
            self._metrics.update()
            _refuse(sender, error, _is_from_model(request))

    def _submit(self, request: Any, sender: Any) -> None:
        order = read_order({tensor.name(): tensor.as_numpy() for tensor in request.inputs()}, self._engine.model.recipe)
        self._safety.check_prompt(order.params.prompt)

        answers = Answers(self._senders)

        def show(preview: Preview) -> None:
            answers.add(partial(self._send_preview, order, sender, preview))

        delivery = Delivery(
            latency_budget_ms=order.latency_budget_ms,
            min_inference_steps=order.min_inference_steps,
            strict=order.strict,
            on_preview=show,
            num_previews=order.num_previews,
        )
        future = self._engine.submit(order.params, delivery)
        with self._wake:
            self._live[future] = sender
            self._wake.notify()
        finish = partial(self._finish, order, sender, _is_from_model(request))
        future.add_done_callback(lambda done: answers.add(partial(finish, done)))

    def _send_preview(self, order: Order, sender: Any, preview: Preview) -> None:
        """Send a preview; of a clip its first frame, a picture."""
        first, *_ = frames_of(preview.params, preview.pixels)
        try:
            self._safety.check_picture(first)
        except InvalidRequestError:
            return  # the picture itself is checked too, and its error is the answer
        shown_as = order.file_format
        if shown_as is not None and shown_as not in PICTURES:
            shown_as = "png"
        params = replace(order.params, frames=None)
        made = _pixels_or_file(self._engine.model, params, first, shown_as)
        sender.send(_response(made, order.params.seed, preview.num_steps_taken, is_preview=True))

    def _finish(self, order: Order, sender: Any, is_from_model: bool, done: Future[Picture]) -> None:
        """Send the picture, or why there is none."""
        with self._wake:
            del self._live[done]
        self._metrics.update()  # first, so that whoever has the answer finds it counted
        try:
            if done.cancelled():
                raise CancelledError("the client cancelled the request")
            picture = done.result()
            for pixels in frames_of(picture.params, picture.pixels):
                self._safety.check_picture(pixels)
            _send_last(sender, self._answer(order, picture))
        except Exception as error:
            _refuse(sender, error, is_from_model)

    def _answer(self, order: Order, picture: Picture) -> Any:
        model, params = self._engine.model, picture.params
        receipt = receipt_of(model, params, picture.pixels, picture.is_strict)
        made = _pixels_or_file(model, params, picture.pixels, order.file_format, receipt)
        return _response(made, params.seed, params.num_inference_steps, False, picture.predicted_ms, receipt.to_json())

    def _watch_requests(self) -> None:
        """Cancel what clients have left. Show the engine's counts: it counts a cancelled picture at its next call."""
        while True:
            is_busy = self._engine.num_live > 0
            if not self._is_closing:
                self._metrics.update()
            with self._wake:
                if self._is_closing:
                    return
                self._wake.wait(POLL_S if self._live or is_busy else None)
                # Under the lock: asking a sender whose last response is on its way crashes the server.
                left = [future for future, sender in self._live.items() if sender.is_cancelled()]
            for future in left:
                future.cancel()  # takes effect at the next call


def _is_from_model(request: Any) -> bool:
    """Return whether `tdm_http` sent the request."""
    return '"is_from_model"' in request.parameters()


def _pixels_or_file(
    model: LoadedModel,
    params: SamplingParams,
    pixels: Pixels,
    file_format: FileFormat | None,
    receipt: Receipt | None = None,
) -> Any:
    """Return the output with a picture or clip."""
    kind = "image" if params.frames is None else "clip"
    if file_format is None:
        return pb_utils.Tensor(f"generated_{kind}", np.ascontiguousarray(pixels))
    content = encode_made(model, params, pixels, file_format, receipt=receipt)
    return pb_utils.Tensor(f"encoded_{kind}", np.array([content], dtype=np.object_))


def _response(
    made: Any, seed: int, steps: int, is_preview: bool, predicted_ms: float = math.nan, receipt: str = ""
) -> Any:
    """Return a response with a picture or clip."""
    numbers = {
        "is_preview": np.array([is_preview]),
        "seed": np.array([seed], np.uint64),
        "num_inference_steps": np.array([steps], np.int32),
        "predicted_ms": np.array([predicted_ms], np.float32),
        "receipt": np.array([receipt.encode()], dtype=np.object_),
    }
    return pb_utils.InferenceResponse([made, *(pb_utils.Tensor(name, value) for name, value in numbers.items())])


def _refuse(sender: Any, error: Exception, is_from_model: bool) -> None:
    """Send an error as the last response. Over BLS, which loses its code, the message begins with the code's name."""
    message, code = _message_and_code(error)
    if is_from_model:
        message = f"{code}: {message}"
    answer = pb_utils.TritonError(message, getattr(pb_utils.TritonError, code))
    _send_last(sender, pb_utils.InferenceResponse(error=answer))


def _send_last(sender: Any, response: Any) -> None:
    """Send the last response; to a client that has left only the end.

    Triton's gRPC front keeps a response that it cannot deliver, and with it the model, which then is never unloaded.
    """
    if sender.is_cancelled():
        sender.send(flags=FINAL)
    else:
        sender.send(response, flags=FINAL)


def _message_and_code(error: Exception) -> tuple[str, str]:
    """Return the message of an error for its client, and the name of Triton's code."""
    if isinstance(error, OverloadedError):
        return f"{error}; retry in {error.retry_after_s:.2f} s", "UNAVAILABLE"
    if isinstance(error, TDMError):
        codes = {InvalidRequestError: "INVALID_ARG", CancelledError: "CANCELLED"}
        return str(error), codes.get(type(error), "INTERNAL")
    pb_utils.Logger.log_error(f"{type(error).__name__}: {error}")
    return f"the request failed ({type(error).__name__}); the server's log says why", "INTERNAL"
