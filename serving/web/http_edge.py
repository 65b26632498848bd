"""ASGI middleware around all routes: keys, a bound on open requests, errors in one shape, log lines and metrics."""

from __future__ import annotations

import asyncio
import logging
import re
import time

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.arrival import arrive
from serving.errors import CLIENT_CLOSED_REQUEST, APIError, invalid, shown_json
from serving.fronts.access import Caller
from serving.fronts.edge import admit, note_code, note_departure, note_error, recorded
from serving.fronts.services import Services
from serving.telemetry.metrics import OTHER
from serving.telemetry.tracing import current_span
from serving.web.proxied import own_path

logger = logging.getLogger(__name__)

OPEN_PATHS = ("/health", "/ready", "/v2/health/live", "/v2/health/ready", "/")
"""Paths that need no key: health, readiness, and the page where the user enters the key."""
OPEN_PREFIXES = ("/playground/static/", "/v1/files/")
"""Prefixes of paths that need no key. The names of files cannot be guessed."""
STATUS_PATH = re.compile(r"/health|/ready|/metrics|/v2/health/(live|ready)|/v2/models/.+/ready")
"""Paths that are answered even while the server stops or has too many requests. Monitors ask often; no traces."""
INFERENCE_PATH = re.compile(r"/v2(/.*)?", re.DOTALL)
"""Paths of the Open Inference Protocol, whose errors have another shape."""
SECURITY_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
MOUNTED = "{path}"
"""End of the template of a mounted folder; Starlette sets no route for files in one."""
UNSERVED_STATUS = {404: "not_found", 405: "method_not_allowed"}


def add_edges(app: FastAPI, services: Services) -> None:
    """Put the middleware around an application, and give FastAPI's own errors the shape of the API."""
    routes = frozenset(path for route in app.routes if (path := getattr(route, "path_format", None)))
    app.add_middleware(EdgeMiddleware, services=services, routes=routes)

    @app.exception_handler(HTTPException)
    async def unserved(request: Request, error: HTTPException) -> Response:
        code = UNSERVED_STATUS.get(error.status_code, "http_error")
        message = f"{request.method} {request.url.path[:80]}: {error.detail}; see /openapi.json for what is served"
        answer = invalid(message, None, code, error.status_code)
        note_code(code, error.status_code)
        answer.headers |= dict(error.headers or {})
        return error_response(answer, own_path(request.scope))

    @app.exception_handler(RequestValidationError)
    async def unread(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        param = str(first["loc"][-1])
        message = f"{param[:64]} is {shown_json(first.get('input'))}; {first['msg'][:1].lower()}{first['msg'][1:]}"
        answer = note_error(invalid(message, param[:64], "invalid_value"), services, "-")
        return error_response(answer, own_path(request.scope))


def caller_of(request: Request) -> Caller:
    """Return the caller that the middleware admitted."""
    caller = request.scope["caller"]
    assert isinstance(caller, Caller), "requests to open paths have no caller"
    return caller


def is_status(path: str) -> bool:
    """Return whether a path asks for the server's status."""
    return STATUS_PATH.fullmatch(path) is not None


def error_response(error: APIError, path: str) -> Response:
    """Return an error in the shape that clients of the path read."""
    if INFERENCE_PATH.fullmatch(path):
        return JSONResponse({"error": error.message}, error.status, error.headers)
    return error.to_response()


class EdgeMiddleware:
    """Keys, a bound on open requests, security headers, telemetry; every exception as an API error."""

    def __init__(self, app: ASGIApp, services: Services, routes: frozenset[str]) -> None:
        """
        Args:
            routes: templates of all served paths.
        """
        self.app = app
        self.services = services
        self._routes = routes
        self._mounts = [route for route in routes if route.endswith(f"/{MOUNTED}")]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id, method = headers.get("x-request-id", "-")[:64], scope["method"]
        with recorded(self.services, headers, request_id, method, method, is_status(own_path(scope))):
            await self._answer(scope, receive, send, headers)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, headers: Headers) -> None:
        services, span = self.services, current_span()
        request_id = shown_request_id(headers)
        started_s, method = time.monotonic(), scope["method"]
        if is_head := method == "HEAD":  # as GET without a body (RFC 9110, 9.3.2)
            scope = {**scope, "method": "GET"}
        arrive()
        status = 0
        services.num_active += 1

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update(SECURITY_HEADERS)
                if span is not None:
                    MutableHeaders(scope=message)["traceresponse"] = span.traceparent
            elif is_head and message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        try:
            self._admit(scope, headers)
            if not is_status(own_path(scope)):
                await services.turnstile.passed()
            await self.app(scope, receive, send_with_headers)
        except asyncio.CancelledError:
            status = CLIENT_CLOSED_REQUEST
            note_departure(services)
            raise
        except Exception as error:
            if status:  # the response has begun; its status cannot change
                note_code("internal_error", 500)
                raise
            response = error_response(note_error(error, services, request_id), own_path(scope))
            await response(scope, receive, send_with_headers)
        finally:
            services.num_active -= 1
            self._record(method, scope, status, 1e3 * (time.monotonic() - started_s), request_id)

    def _record(self, method: str, scope: Scope, status: int, elapsed_ms: float, request_id: str) -> None:
        """Count, log and trace the outcome of a request."""
        route = self._route(scope)
        self.services.metrics.observe_answer(method, route, status)
        shown = repr(own_path(scope)[:80]) if route == OTHER else route  # a template shows no file names
        fields = {"route": route, "status": status, "duration_ms": round(elapsed_ms, 2)}
        logger.info("%s %s %d %.1f ms %s", method, shown, status, elapsed_ms, request_id, extra=fields)
        if (span := current_span()) is not None:
            span.rename(f"{method} {route}")
            span.set({"http.request.method": method, "http.route": route, "http.response.status_code": status})

    def _route(self, scope: Scope) -> str:
        """Return the template of the requested path."""
        route = str(getattr(scope.get("route"), "path_format", own_path(scope)))
        if route in self._routes:
            return route
        return next((mount for mount in self._mounts if route.startswith(mount.removesuffix(MOUNTED))), OTHER)

    def _admit(self, scope: Scope, headers: Headers) -> None:
        """Set the request's caller.

        Raises:
            APIError: 401, 429 or 503, see `admit`.
        """
        path = own_path(scope)
        if path not in OPEN_PATHS and not path.startswith(OPEN_PREFIXES):
            scope["caller"] = admit(self.services, headers.get("authorization"), is_status(path))


def shown_request_id(headers: Headers) -> str:
    """Return the request id in a form that is safe in a log line."""
    return repr(headers.get("x-request-id", "-")[:64])
