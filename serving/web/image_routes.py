"""POST /v1/images/generations and GET /v1/models."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse

from serving.fronts.edge import note_error
from serving.fronts.idempotency import check_key, seed_of
from serving.fronts.services import Services
from serving.schema.answers import ImageAnswer, ImageTimings, PartialAnswer
from serving.schema.image_request import ImageRequest, ImageResponse, order_from_body, to_event, to_response
from serving.schema.models import ModelCard, ModelList
from serving.schema.order import ImageOrder
from serving.web.body import read_json
from serving.web.documentation import documented_body
from serving.web.file_routes import base_url
from serving.web.http_edge import caller_of, shown_request_id
from tdm_runtime.media.image_file import ImageFormat

UNBUFFERED = {"cache-control": "no-store", "x-accel-buffering": "no"}
"""Headers of streams, so that proxies pass each event on at once."""
MEDIA_TYPES: dict[str, ImageFormat] = {"image/png": "png", "image/webp": "webp", "image/jpeg": "jpeg"}
PICTURE = {"schema": {"type": "string", "format": "binary"}}
EVENT = {
    "type": "object",
    "description": "One event; `data` is JSON.",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["event", "data"],
}
ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The pictures; with `stream`, events; with `Accept: image/png`, webp or jpeg, a file.",
        "content": {"text/event-stream": {"schema": EVENT}, **dict.fromkeys(MEDIA_TYPES, PICTURE)},
    }
}


def add_image_routes(app: FastAPI, services: Services) -> None:
    """Add the routes of pictures and models."""

    @app.post(
        "/v1/images/generations",
        openapi_extra=documented_body(json=ImageRequest.model_json_schema()),
        response_model=ImageResponse,
        responses=ANSWERS,
    )
    async def generate_images(request: Request) -> Response:
        """Make pictures for a prompt."""
        caller = caller_of(request)
        body = await read_json(request, services.config)
        accepted = accepted_formats(request.headers.get("accept", "*/*"))
        key = request.headers.get("idempotency-key")
        if key is not None:
            check_key(key)
        default_seed = None if key is None else seed_of(caller.name, key)
        order = order_from_body(body, services.images.recipe, accepted, default_seed)

        async def answer() -> Response:
            caller.spend(order.cost)
            made = await services.images.generate(order)
            return file_response(made) if accepted else await json_response(made, order, request, services)

        if order.delivery.is_streamed:
            caller.spend(order.cost)
            parts = await services.images.stream(order)
            text = server_sent(parts, services, shown_request_id(request.headers))
            return StreamingResponse(text, media_type="text/event-stream", headers=UNBUFFERED)
        if key is None:
            return await answer()
        return await services.replays.once(caller.name, key, f"{','.join(accepted)}\0".encode() + body, answer)

    @app.get("/v1/models")
    async def list_models() -> ModelList:
        """List the served models."""
        return ModelList(data=services.images.models())

    @app.get("/v1/models/{model_id}")
    async def get_model(model_id: str) -> ModelCard:
        """Describe one model."""
        return services.images.model_card(model_id)


def accepted_formats(accept: str) -> list[ImageFormat]:
    """Return the picture formats that an `Accept` header prefers, the best first; none for JSON.

    Types that are not served and those with weight 0 are passed over (RFC 9110, 12.5.1).
    """
    found: list[tuple[float, str]] = []
    for part in accept.split(","):
        media_type, *settings = (word.strip().lower() for word in part.split(";"))
        weights = [word[2:] for word in settings if word.startswith("q=")]
        try:
            found.append((float(weights[0]) if weights else 1.0, media_type))
        except ValueError:
            continue
    refused = {media_type for weight, media_type in found if weight <= 0.0}
    for weight, media_type in sorted(found, key=lambda each: -each[0]):
        if weight > 0.0 and media_type in MEDIA_TYPES:
            return [MEDIA_TYPES[media_type]]
        if weight > 0.0 and media_type == "image/*":
            return [name for media, name in MEDIA_TYPES.items() if media not in refused]
        if weight > 0.0 and media_type in ("application/json", "application/*", "*/*"):
            break
    return []


def file_response(answer: ImageAnswer) -> Response:
    """Return the response that is one picture's file. Headers, and chunks of a PNG, contain what JSON would."""
    (image,) = answer.images
    headers = {
        "server-timing": server_timing(answer.timings),
        "cache-control": "no-store",
        "x-tdm-model": answer.model,
        "x-tdm-seed": str(image.seed),
        "x-tdm-num-inference-steps": str(image.num_inference_steps),
        "x-tdm-predicted-ms": f"{answer.predicted_ms:.2f}",
        "x-tdm-warnings": "; ".join(answer.warnings),
    }
    if answer.latency_budget_kept is not None:
        headers["x-tdm-latency-budget-kept"] = str(answer.latency_budget_kept).lower()
    return Response(image.content, media_type=f"image/{answer.output_format}", headers=headers)


async def json_response(answer: ImageAnswer, order: ImageOrder, request: Request, services: Services) -> Response:
    """Return the JSON response, with the pictures or with their URLs."""
    if order.encoding.response_format == "url":
        base = base_url(request, services.config)
        published = await asyncio.to_thread(services.artifacts.publish, answer, base, services.config.artifact_ttl_s)
        body = to_response(answer, *published).model_dump_json()
    else:
        body = to_response(answer, urls=None).model_dump_json()
    headers = {"server-timing": server_timing(answer.timings)}
    return Response(body, media_type="application/json", headers=headers)


async def server_sent(
    parts: AsyncIterator[PartialAnswer | ImageAnswer], services: Services, request_id: str
) -> AsyncIterator[str]:
    """Yield events as text. An error after the first event becomes an event too."""
    try:
        async for part in parts:
            event = to_event(part)
            yield f"event: {event.type}\ndata: {event.model_dump_json()}\n\n"
    except Exception as error:
        answer = note_error(error, services, request_id)
        yield f"event: error\ndata: {json.dumps(answer.to_body())}\n\n"


def server_timing(timings: ImageTimings) -> str:
    """Return the value of the `Server-Timing` header, which browsers show in their network panel."""
    stages = {
        "queue": timings.queue_ms,
        "text": timings.text_ms,
        "denoise": sum(timings.steps_ms),
        "decode": timings.decode_ms,
        "encode": timings.encode_ms,
        "total": timings.total_ms,
    }
    return ", ".join(f"{name};dur={duration:.2f}" for name, duration in stages.items())
