"""What every request passes: who asks, how many at once, errors in one shape, one log line."""

from __future__ import annotations

import asyncio
import logging
import time

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.access import Caller
from serving.errors import APIError, from_exception, invalid, not_ready
from serving.services import Services
from serving.web.body import CLIENT_CLOSED_REQUEST
from tdm_runtime.errors import shown

logger = logging.getLogger(__name__)

OPEN_PATHS = ("/health", "/ready", "/")
"""Served without a key: whether it runs, and the page that asks for the key."""
OPEN_PREFIXES = ("/playground/static/", "/v1/files/")
"""Files are found by names that nobody guesses, for as long as they live."""
STATUS_PATHS = ("/health", "/ready", "/metrics")
"""Answered while the server stops, and however many others there are."""
SECURITY_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
UNSERVED_STATUS = {404: "not_found", 405: "method_not_allowed"}


def add_edges(app: FastAPI, services: Services) -> None:
    """Put the edge around an application, and give its own refusals the one shape."""
    app.add_middleware(EdgeMiddleware, services=services)

    @app.exception_handler(HTTPException)
    async def unserved(request: Request, error: HTTPException) -> Response:
        code = UNSERVED_STATUS.get(error.status_code, "http_error")
        message = f"{request.method} {request.url.path[:80]}: {error.detail}; see /openapi.json for what is served"
        answer = invalid(message, None, code, error.status_code)
        answer.headers |= dict(error.headers or {})
        return answer.to_response()

    @app.exception_handler(RequestValidationError)
    async def unread(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        param = str(first["loc"][-1])
        message = f"{param[:64]} is {shown(first.get('input'))}; {first['msg'][:1].lower()}{first['msg'][1:]}"
        return note_error(invalid(message, param[:64], "invalid_value"), services, "-").to_response()


def caller_of(request: Request) -> Caller:
    """Who asks, as the edge found out."""
    caller = request.scope["caller"]
    assert isinstance(caller, Caller), "the edge lets nobody pass unseen"
    return caller


class EdgeMiddleware:
    """Keys, a bound on open requests, security headers, counting; every exception as an API error."""

    def __init__(self, app: ASGIApp, services: Services) -> None:
        self.app = app
        self.services = services

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        services = self.services
        headers = Headers(scope=scope)
        request_id = shown_request_id(headers)
        started_s = time.monotonic()
        status = 0
        services.num_active += 1

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update(SECURITY_HEADERS)
            await send(message)

        try:
            self._admit(scope, headers)
            await self.app(scope, receive, send_with_headers)
        except asyncio.CancelledError:
            status = CLIENT_CLOSED_REQUEST
            services.metrics.cancelled.inc()
            raise
        except Exception as error:
            if status:  # the response is on its way: nothing can be said any more
                raise
            response = note_error(error, services, request_id).to_response()
            await response(scope, receive, send_with_headers)
        finally:
            services.num_active -= 1
            services.metrics.requests.labels(status).inc()
            elapsed_ms = 1e3 * (time.monotonic() - started_s)
            logger.info("%s %s %d %.1f ms %s", scope["method"], scope["path"][:80], status, elapsed_ms, request_id)

    def _admit(self, scope: Scope, headers: Headers) -> None:
        """Let a request pass with its caller, or raise what it is refused for."""
        path, services = scope["path"], self.services
        if path in OPEN_PATHS or path.startswith(OPEN_PREFIXES):
            return
        scope["caller"] = services.access.caller(headers.get("authorization"))
        if path in STATUS_PATHS:
            return
        if services.is_draining:
            raise not_ready("the server is stopping; send the request to another")
        most = services.config.max_open_requests
        if services.num_active > most:
            message = f"{most} requests are open, which is the most; retry in a second"
            raise APIError(429, message, "rate_limit_error", code="too_many_requests", headers={"retry-after": "1"})


def note_error(error: Exception, services: Services, request_id: str) -> APIError:
    """Turn an exception into what the client is told, counted and, where it is ours, logged."""
    answer = from_exception(error)
    services.metrics.rejected.labels(answer.code).inc()
    if answer.code == "not_finite":
        services.metrics.not_finite.inc()
    if answer.code == "internal_error":
        logger.error("request %s failed", request_id, exc_info=error)
    return answer


def shown_request_id(headers: Headers) -> str:
    """As the log may repeat it; the front makes one where the client sent none."""
    return repr(headers.get("x-request-id", "-")[:64])
