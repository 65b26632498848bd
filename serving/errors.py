"""Errors of the server, in the shape of the OpenAI API: {"error": {message, type, param, code}}."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from fastapi.responses import JSONResponse

from tdm_runtime.errors import (
    DeadlineError,
    GenerationError,
    InvalidRequestError,
    NotFiniteError,
    OverloadedError,
    shown,
)

CLIENT_CLOSED_REQUEST = 499
"""Status in logs and metrics of a request whose client left before its answer."""
MAX_RETRY_S = 2.0
"""Longest wait of background work before it asks a busy server again, in seconds."""
Made = TypeVar("Made")


@dataclass
class APIError(Exception):
    """An error that the client receives."""

    status: int
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__(self.message)

    def __reduce__(self) -> tuple[object, ...]:
        return APIError, (self.status, self.message, self.type, self.param, self.code, self.headers)

    def to_response(self) -> JSONResponse:
        return JSONResponse(self.to_body(), self.status, self.headers)

    def to_body(self) -> dict[str, dict[str, str | None]]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def shown_json(value: object) -> str:
    """Return a value of a request for a message: `shown`, with JSON's words for null, true and false."""
    return json.dumps(value) if value is None or isinstance(value, bool) else shown(value)


def invalid(message: str, param: str | None, code: str, status: int = 400) -> APIError:
    """Return the error of a request that is wrong and would fail again."""
    return APIError(status, message, param=param, code=code, headers={"x-should-retry": "false"})


def unknown_model(name: str, known: Iterable[str]) -> APIError:
    """Return the error of a request for a model that this server does not have."""
    message = f"model {name[:64]!r} does not exist; this server has {', '.join(known)}"
    return invalid(message, "model", "model_not_found", 404)


def reused_key(key: str) -> APIError:
    """Return the error of an idempotency key that came with another body before."""
    message = f"Idempotency-Key {key[:64]!r} was used with another body; a new request needs a new key"
    return invalid(message, "Idempotency-Key", "idempotency_key_reused", 422)


def not_ready(message: str) -> APIError:
    """Return the error of a server that cannot make pictures now. Another replica may be able to."""
    return APIError(503, message, "server_error", code="not_ready", headers={"retry-after": "1"})


def retry_after_s(error: Exception) -> float | None:
    """Return the seconds after which to retry a busy or stopping server; None for other errors."""
    answer = from_exception(error)
    return float(answer.headers.get("retry-after", 1)) if answer.status in (429, 503) else None


async def made_when_free(make: Callable[[], Awaitable[Made]]) -> Made:
    """Return what `make` returns. While the server is busy or stopping, wait and call it again."""
    while True:
        try:
            return await make()
        except Exception as error:
            if (wait_s := retry_after_s(error)) is None:
                raise
            await asyncio.sleep(min(wait_s, MAX_RETRY_S))


def from_exception(error: Exception) -> APIError:
    """Return the client's error for an exception. An unforeseen one becomes a 500 that reveals nothing."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, InvalidRequestError):
        return invalid(str(error), error.param, error.code)
    if isinstance(error, OverloadedError):
        code = "latency_budget_unavailable" if isinstance(error, DeadlineError) else "queue_full"
        headers = {
            "retry-after": str(math.ceil(error.retry_after_s)),
            "retry-after-ms": str(math.ceil(1e3 * error.retry_after_s)),
        }
        return APIError(429, str(error), "rate_limit_error", code=code, headers=headers)
    if isinstance(error, TimeoutError):
        return APIError(504, "the request was not answered in time and was cancelled", "server_error", code="timeout")
    if isinstance(error, NotFiniteError):
        # The same request would fail again: its noise is a function of its seed.
        headers = {"x-should-retry": "false"}
        return APIError(500, str(error), "server_error", code="not_finite", headers=headers)
    if isinstance(error, GenerationError):
        return APIError(500, str(error), "server_error", code="generation_failed")
    return APIError(500, "internal error; the request was not at fault", "server_error", code="internal_error")
