"""How a generation is answered over HTTP: in JSON, as a file, or as a stream of events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from serving.fronts.edge import note_error
from serving.fronts.idempotency import check_key, seed_of
from serving.fronts.services import Services
from serving.jobs.artifacts import MEDIA_TYPES
from serving.schema.answers import ImageAnswer, ImageTimings, PartialAnswer
from serving.schema.order import ImageOrder
from serving.web.file_routes import base_url
from serving.web.http_edge import caller_of, shown_request_id

UNBUFFERED = {"cache-control": "no-store", "x-accel-buffering": "no"}
"""Headers of streams, so that proxies pass each event on at once."""


FILE = {"schema": {"type": "string", "format": "binary"}}
EVENT = {
    "type": "object",
    "description": "One event; `data` is JSON.",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["event", "data"],
}
Format = TypeVar("Format", bound=str)


class Event(Protocol):
    """An event of a stream, a Pydantic model."""

    @property
    def type(self) -> str:
        """Its name."""

    def model_dump_json(self) -> str: ...


@dataclass(frozen=True)
class Shapes:
    """The bodies of answers to one route."""

    to_response: Callable[[ImageAnswer, list[str] | None, int | None], BaseModel]
    """Takes the answer, and the URLs of its files with their time of expiry in Unix seconds, or None for both."""
    to_event: Callable[[PartialAnswer | ImageAnswer], Event]
    """Returns an event of a stream."""


def documented_answers(made: str, media_types: Mapping[str, str]) -> dict[int | str, dict[str, Any]]:
    """Return what the OpenAPI document says of a generation's answers beside JSON.

    Args:
        made: what is made, and the files that an `Accept` header gets.
        media_types: the media types of those files.
    """
    content = {"text/event-stream": {"schema": EVENT}, **dict.fromkeys(media_types, FILE)}
    return {200: {"description": made, "content": content}}


def default_seed(request: Request) -> int | None:
    """Return the seed of a request that names none but has an idempotency key; None draws one.

    Raises:
        APIError: 400, the key cannot be used.
    """
    key = request.headers.get("idempotency-key")
    if key is None:
        return None
    check_key(key)
    return seed_of(caller_of(request).name, key)


def accepted_formats(accept: str, media_types: Mapping[str, Format]) -> list[Format]:
    """Return the file formats that an `Accept` header prefers, the best first; none for JSON.

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
        if weight > 0.0 and media_type in media_types:
            return [media_types[media_type]]
        if weight > 0.0 and media_type in ("image/*", "video/*"):
            kind = media_type.removesuffix("*")
            return [name for media, name in media_types.items() if media.startswith(kind) and media not in refused]
        if weight > 0.0 and media_type in ("application/json", "application/*", "*/*"):
            break
    return []


async def respond(
    request: Request, services: Services, body: bytes, order: ImageOrder, shapes: Shapes, *, as_file: bool
) -> Response:
    """Make what was ordered. A repeated `Idempotency-Key` with the same body gets the same answer.

    Args:
        body: Body of the request.
        as_file: Whether the file is the whole answer.
    """
    caller, key = caller_of(request), request.headers.get("idempotency-key")

    async def answer() -> Response:
        caller.spend(order.cost)
        made = await services.images.generate(order)
        return file_response(made) if as_file else await json_response(made, order, request, services, shapes)

    if order.delivery.is_streamed:
        caller.spend(order.cost)
        parts = await services.images.stream(order)
        text = server_sent(parts, services, shown_request_id(request.headers), shapes)
        return StreamingResponse(text, media_type="text/event-stream", headers=UNBUFFERED)
    if key is None:
        return await answer()
    kind = order.encoding.output_format if as_file else "json"
    return await services.replays.once(caller.name, key, f"{request.url.path}\0{kind}\0".encode() + body, answer)


def file_response(answer: ImageAnswer) -> Response:
    """Return the response that is one file. Headers, and metadata of PNG, MP4 and WebM, contain what JSON would."""
    (image,) = answer.images
    headers = {
        "server-timing": server_timing(answer.timings),
        "cache-control": "no-store",
        "x-tdm-model": answer.model,
        "x-tdm-seed": str(image.seed),
        "x-tdm-num-inference-steps": str(image.num_inference_steps),
        "x-tdm-num-steps-taken": str(image.num_steps_taken),
        "x-tdm-predicted-ms": f"{answer.predicted_ms:.2f}",
        "x-tdm-warnings": "; ".join(answer.warnings),
    }
    if answer.latency_budget_kept is not None:
        headers["x-tdm-latency-budget-kept"] = str(answer.latency_budget_kept).lower()
    return Response(image.content, media_type=MEDIA_TYPES[answer.output_format], headers=headers)


async def json_response(
    answer: ImageAnswer, order: ImageOrder, request: Request, services: Services, shapes: Shapes
) -> Response:
    """Return the JSON response, with the files or with their URLs."""
    if order.encoding.response_format == "url":
        base = base_url(request)
        published = await asyncio.to_thread(services.artifacts.publish, answer, base, services.config.artifact_ttl_s)
        body = shapes.to_response(answer, *published).model_dump_json()
    else:
        body = shapes.to_response(answer, None, None).model_dump_json()
    headers = {"server-timing": server_timing(answer.timings)}
    return Response(body, media_type="application/json", headers=headers)


async def server_sent(
    parts: AsyncIterator[PartialAnswer | ImageAnswer], services: Services, request_id: str, shapes: Shapes
) -> AsyncIterator[str]:
    """Yield events as text. An error after the first event becomes an event too."""
    try:
        async for part in parts:
            event = shapes.to_event(part)
            yield f"event: {event.type}\ndata: {event.model_dump_json()}\n\n"
    except Exception as error:
        answer = note_error(error, services, request_id)
        yield f"event: error\ndata: {json.dumps(answer.to_body())}\n\n"


def server_timing(timings: ImageTimings) -> str:
    """Return the value of the `Server-Timing` header, which browsers show in their network panel."""
    stages = {
        "queue": timings.queue_ms,
        "text": timings.text_ms,
        **({"image": timings.image_ms} if timings.image_ms else {}),
        "denoise": sum(timings.steps_ms),
        "decode": timings.decode_ms,
        "encode": timings.encode_ms,
        "total": timings.total_ms,
    }
    return ", ".join(f"{name};dur={duration:.2f}" for name, duration in stages.items())
