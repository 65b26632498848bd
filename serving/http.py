"""Routes and the edges of HTTP: limits, request ids, errors in one shape."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.config import ServerConfig
from serving.errors import APIError, from_exception, invalid, not_ready
from serving.schema import (
    CompletedImage,
    ImageRequest,
    ImageResponse,
    ImageTimings,
    ModelCard,
    ModelList,
    PartialImage,
    parse_image_request,
)
from serving.service import ImageService, check_static_files

logger = logging.getLogger(__name__)

STATIC_FOLDER = Path(__file__).with_name("static")
CLIENT_CLOSED_REQUEST = 499
SECURITY_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
UNBUFFERED = {"cache-control": "no-store", "x-accel-buffering": "no"}
"""For streams: proxies pass every event on as it comes."""
UNSERVED_STATUS = {404: "not_found", 405: "method_not_allowed"}


def build_app(service: ImageService) -> FastAPI:
    """Return the ASGI application of a service."""
    check_static_files(STATIC_FOLDER)
    app = FastAPI(title="TDM image server", version="1", docs_url=None, redoc_url=None)
    _add_image_routes(app, service)
    _add_operation_routes(app, service)
    _add_playground(app)
    _add_edges(app, service)
    return app


def _add_image_routes(app: FastAPI, service: ImageService) -> None:
    @app.post("/v1/images/generations", openapi_extra=_documented_body(), response_model=ImageResponse)
    async def generate_images(request: Request) -> Response:
        """Make pictures for a prompt."""
        wanted = parse_image_request(await read_body(request, service.config))
        if wanted.stream:
            events = await service.stream(wanted)
            text = server_sent(events, service, shown_request_id(request.headers))
            return StreamingResponse(text, media_type="text/event-stream", headers=UNBUFFERED)
        answer = await service.generate(wanted)
        headers = {"server-timing": _server_timing(answer.timings)}
        return Response(answer.model_dump_json(), media_type="application/json", headers=headers)

    @app.get("/v1/models")
    async def list_models() -> ModelList:
        """List the served models."""
        return service.models()

    @app.get("/v1/models/{model_id}")
    async def get_model(model_id: str) -> ModelCard:
        """Describe one model."""
        for card in service.models().data:
            if card.id == model_id:
                return card
        known = ", ".join(card.id for card in service.models().data)
        raise invalid(
            f"model {model_id[:64]!r} does not exist; this server has {known}", "model", "model_not_found", 404
        )


def _add_operation_routes(app: FastAPI, service: ImageService) -> None:
    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> JSONResponse:
        """Whether pictures can be made."""
        if service.is_ready:
            return JSONResponse({"status": "ready"})
        raise not_ready("the server is stopping, or its engine is not running")

    @app.get("/metrics")
    async def metrics() -> Response:
        """Prometheus metrics."""
        return Response(service.metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_playground(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    async def playground() -> FileResponse:
        return FileResponse(STATIC_FOLDER / "index.html")

    app.mount("/playground/static", StaticFiles(directory=STATIC_FOLDER))


def _add_edges(app: FastAPI, service: ImageService) -> None:
    app.add_middleware(EdgeMiddleware, service=service)

    @app.exception_handler(HTTPException)
    async def unserved(request: Request, error: HTTPException) -> Response:
        code = UNSERVED_STATUS.get(error.status_code, "http_error")
        message = f"{request.method} {request.url.path[:80]}: {error.detail}; see /openapi.json for what is served"
        answer = invalid(message, None, code, error.status_code)
        answer.headers |= dict(error.headers or {})
        return answer.to_response()


class EdgeMiddleware:
    """Security headers, counting, one log line; and every exception as an API error."""

    def __init__(self, app: ASGIApp, service: ImageService) -> None:
        self.app = app
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = shown_request_id(Headers(scope=scope))
        started_s = time.monotonic()
        status = 0
        self.service.num_active += 1

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update(SECURITY_HEADERS)
            await send(message)

        try:
            await self.app(scope, receive, send_with_headers)
        except asyncio.CancelledError:
            status = CLIENT_CLOSED_REQUEST
            self.service.metrics.cancelled.inc()
            raise
        except Exception as error:
            if status:  # the response is on its way: nothing can be said any more
                raise
            response = note_error(error, self.service, request_id).to_response()
            await response(scope, receive, send_with_headers)
        finally:
            self.service.num_active -= 1
            self.service.metrics.requests.labels(status).inc()
            elapsed_ms = 1e3 * (time.monotonic() - started_s)
            logger.info("%s %s %d %.1f ms %s", scope["method"], scope["path"][:80], status, elapsed_ms, request_id)


def note_error(error: Exception, service: ImageService, request_id: str) -> APIError:
    """Turn an exception into what the client is told, counted and, where it is ours, logged."""
    answer = from_exception(error)
    service.metrics.rejected.labels(answer.code).inc()
    if answer.code == "not_finite":
        service.metrics.not_finite.inc()
    if answer.code == "internal_error":
        logger.error("request %s failed", request_id, exc_info=error)
    return answer


def shown_request_id(headers: Headers) -> str:
    """As the log may repeat it; the front makes one where the client sent none."""
    return repr(headers.get("x-request-id", "-")[:64])


async def server_sent(
    events: AsyncIterator[PartialImage | CompletedImage], service: ImageService, request_id: str
) -> AsyncIterator[str]:
    """Events as text; a failure among them is one too."""
    try:
        async for event in events:
            yield f"event: {event.type}\ndata: {event.model_dump_json()}\n\n"
    except Exception as error:
        answer = note_error(error, service, request_id)
        yield f"event: error\ndata: {json.dumps(answer.to_body())}\n\n"


async def read_body(request: Request, config: ServerConfig) -> bytes:
    """Read a JSON body within the limits of size and time.

    Raises:
        APIError: 408, 413 or 415.
    """
    _check_headers(request)
    chunks, size = [], 0
    try:
        async with asyncio.timeout(config.body_timeout_s):
            async for chunk in request.stream():
                size += len(chunk)
                if size > config.max_body_bytes:
                    message = f"the body is larger than {config.max_body_bytes} bytes; shorten the prompt"
                    raise invalid(message, None, "body_too_large", 413)
                chunks.append(chunk)
    except TimeoutError:
        message = f"the body did not arrive within {config.body_timeout_s:g} s; send it at once"
        raise APIError(408, message, "invalid_request_error", code="body_timeout") from None
    except ClientDisconnect:
        raise APIError(CLIENT_CLOSED_REQUEST, "the client left while sending", code="client_closed") from None
    return b"".join(chunks)


def _check_headers(request: Request) -> None:
    encoding = request.headers.get("content-encoding", "identity")
    if encoding != "identity":
        raise invalid(
            f"content-encoding {encoding[:32]!r} is not read; send plain JSON", None, "unsupported_encoding", 415
        )
    media_type = request.headers.get("content-type", "application/json").split(";")[0].strip().lower()
    if media_type != "application/json":
        raise invalid(
            f"content-type {media_type[:64]!r} is not read; send application/json", None, "unsupported_media_type", 415
        )


def _server_timing(timings: ImageTimings) -> str:
    """The standard header that browsers show in their network panel."""
    stages = {
        "queue": timings.queue_ms,
        "text": timings.text_ms,
        "denoise": sum(timings.steps_ms),
        "decode": timings.decode_ms,
        "encode": timings.encode_ms,
        "total": timings.total_ms,
    }
    return ", ".join(f"{name};dur={duration:.2f}" for name, duration in stages.items())


def _documented_body() -> dict[str, Any]:
    """The request body in OpenAPI; it is parsed by hand to be stricter than the framework."""
    schema = ImageRequest.model_json_schema()
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
