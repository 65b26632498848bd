"""Steps that the edges of HTTP and gRPC share: admission, request ids, log lines, spans and errors."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from serving.errors import CLIENT_CLOSED_REQUEST, APIError, from_exception, not_ready
from serving.fronts.access import Caller
from serving.fronts.services import Services
from serving.telemetry import logs
from serving.telemetry.tracing import RequestSpan, current_span, request_span

logger = logging.getLogger(__name__)

MAX_REQUEST_ID = 256
"""Length of a request id, in characters; a longer one is replaced."""
MAX_READING = 32
"""Most requests whose given pictures are read at once, which bounds the memory that they take."""


def request_id_of(given: str) -> str:
    """Return the client's request id, or a random one where a header cannot hold the client's."""
    is_usable = 0 < len(given) <= MAX_REQUEST_ID and given.isascii() and given.isprintable()
    return given if is_usable else str(uuid.uuid4())


@contextmanager
def recorded(
    services: Services, headers: Mapping[str, str], request_id: str, method: str, name: str, is_status: bool
) -> Iterator[RequestSpan | None]:
    """Open the log fields and, with tracing on, the span of one request.

    Args:
        headers: headers or metadata by lower-case name.
        method: method in log lines.
        name: name of the span.
        is_status: whether the request asks for the server's status. Such requests are frequent and not traced.
    """
    logs.begin_request(request_id=request_id, method=method)
    with request_span(None if is_status else services.tracing, headers, name) as span:
        if span is not None:
            logs.note(trace_id=span.trace_id)
        yield span


def admit(services: Services, authorization: str | None, is_status: bool) -> Caller:
    """Return the caller of a request that may pass.

    Args:
        is_status: whether the request asks for the server's status. Such requests always pass with a valid key.

    Raises:
        APIError: 401, no known key; 503, the server is stopping; 429, too many requests are open.
    """
    caller = services.access.caller(authorization)
    if is_status:
        return caller
    if services.is_draining:
        raise not_ready("the server is stopping; send the request to another")
    if services.num_active > (most := services.config.max_open_requests):
        raise too_many(f"{most} requests are open")
    return caller


@contextmanager
def reading_pictures(services: Services) -> Iterator[None]:
    """Count a request while its given pictures are received and decoded.

    Raises:
        APIError: 429, too many are being read.
    """
    if services.num_reading >= MAX_READING:
        raise too_many(f"{MAX_READING} pictures are being read")
    services.num_reading += 1
    try:
        yield
    finally:
        services.num_reading -= 1


def too_many(what: str) -> APIError:
    """Return the error of a request that exceeds a limit."""
    message = f"{what}, which is the most; retry in a second"
    return APIError(429, message, "rate_limit_error", code="too_many_requests", headers={"retry-after": "1"})


def note_error(error: Exception, services: Services, request_id: str) -> APIError:
    """Turn an exception into the client's answer. Count it; log it where the server is at fault."""
    answer = from_exception(error)
    services.metrics.rejected.labels(answer.code).inc()
    note_code(answer.code, answer.status)
    if answer.code == "not_finite":
        services.metrics.not_finite.inc()
    if answer.code == "internal_error":
        logger.error("request %s failed", request_id, exc_info=error)
    return answer


def note_departure(services: Services) -> None:
    """Record that the client left before its answer."""
    services.metrics.cancelled.inc()
    note_code("client_closed", CLIENT_CLOSED_REQUEST)


def note_code(code: str | None, status: int) -> None:
    """Write into the request's log line and span why it failed."""
    logs.note(code=code)
    if (span := current_span()) is not None:
        span.fail(code, status)
