"""What the edges of all fronts do alike: who may come in, and what is told of who failed."""

from __future__ import annotations

import logging

from serving.errors import APIError, from_exception, not_ready
from serving.fronts.services import Services
from serving.telemetry import logs
from serving.telemetry.tracing import current_span

logger = logging.getLogger(__name__)


def check_open(services: Services) -> None:
    """
    Raises:
        APIError: 503, the server is stopping; 429, as many requests are open as may be.
    """
    if services.is_draining:
        raise not_ready("the server is stopping; send the request to another")
    if services.num_active > (most := services.config.max_open_requests):
        raise too_many(f"{most} requests are open")


def too_many(what: str) -> APIError:
    """A refusal of one more of something."""
    message = f"{what}, which is the most; retry in a second"
    return APIError(429, message, "rate_limit_error", code="too_many_requests", headers={"retry-after": "1"})


def note_error(error: Exception, services: Services, request_id: str) -> APIError:
    """Turn an exception into what the client is told, counted and, where it is ours, logged."""
    answer = from_exception(error)
    services.metrics.rejected.labels(answer.code).inc()
    tell_code(answer.code, answer.status)
    if answer.code == "not_finite":
        services.metrics.not_finite.inc()
    if answer.code == "internal_error":
        logger.error("request %s failed", request_id, exc_info=error)
    return answer


def tell_code(code: str | None, status: int) -> None:
    """Why a request got no answer, or not the one it wanted: for its log line and its span."""
    logs.note(code=code)
    if (span := current_span()) is not None:
        span.fail(code, status)


MAX_REQUEST_ID = 256
"""Characters; a longer one is replaced."""
