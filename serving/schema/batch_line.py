"""Lines of batches and of files to render: OpenAI's {custom_id, method, url, body}, or a request's fields alone."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from serving.errors import invalid, shown_json
from serving.schema.edit_request import EditRequest, edit_order_from_fields
from serving.schema.image_request import ImageRequest, RecipeOf, order_from_fields
from serving.schema.order import ImageOrder
from serving.schema.parsing import nullable, parse_json, validate
from serving.schema.video_request import VideoGenerationRequest, video_order_from_fields
from tdm_runtime.checkpoint.recipe import Recipe

MAX_ID_CHARACTERS = 64
Endpoint = Literal["/v1/images/generations", "/v1/images/edits", "/v1/videos/generations"]
IMAGES: Endpoint = "/v1/images/generations"
EDITS: Endpoint = "/v1/images/edits"
VIDEOS: Endpoint = "/v1/videos/generations"
FIELDS: dict[Endpoint, tuple[str, ...]] = {
    IMAGES: tuple(ImageRequest.model_fields),
    EDITS: tuple(EditRequest.model_fields),
    VIDEOS: tuple(VideoGenerationRequest.model_fields),
}
"""Names of the fields of a request."""


class BatchLine(BaseModel):
    """One request of a batch."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra=nullable)

    custom_id: str = Field(
        min_length=1,
        max_length=MAX_ID_CHARACTERS,
        description="The client's own name of the request; unique in a batch.",
    )
    method: Literal["POST"] = "POST"
    url: Endpoint = Field(IMAGES, description="Where the body could be posted, of a picture, an edit or a clip.")
    body: dict[str, Any] = Field(
        description="Body of a request to the url, without stream and latency_budget_ms.",
        json_schema_extra={
            "anyOf": [kind.model_json_schema() for kind in (ImageRequest, EditRequest, VideoGenerationRequest)],
        },
    )


@dataclass(frozen=True)
class RequestLine:
    """One line of a file to render."""

    id: str | None
    """Name that the line gives itself; None for a line without one."""
    url: Endpoint | None
    """See `BatchLine`; None for fields alone."""
    body: dict[str, Any]
    """Fields of the request, unchecked."""


def read_batch_line(line: bytes | Any, default_url: Endpoint = IMAGES) -> BatchLine:
    """Read one request of a batch, as a line of JSON or as decoded fields.

    Args:
        default_url: url of a request that has none.

    Raises:
        APIError: 400 naming the mistake. The body is not checked yet, see `background_order`.
    """
    raw = _decoded_object(line)
    return validate(raw | {"url": default_url if raw.get("url") is None else raw["url"]}, BatchLine)


def read_request_line(line: bytes | dict[str, Any]) -> RequestLine:
    """Read a line of a batch, or the fields of a request with an `id` among them.

    Raises:
        APIError: 400 naming the mistake. The fields of the request are not checked yet, see `background_order`.
    """
    raw = _decoded_object(line)
    if "body" in raw:
        read = validate(raw, BatchLine)
        return RequestLine(read.custom_id, read.url, read.body)
    body = {name: value for name, value in raw.items() if name != "id"}
    if (given := raw.get("id")) is None:
        return RequestLine(None, None, body)
    if isinstance(given, bool) or not isinstance(given, str | int) or not 1 <= len(str(given)) <= MAX_ID_CHARACTERS:
        message = f"id is {shown_json(given)}; give a text of 1 to {MAX_ID_CHARACTERS} characters, or leave it out"
        raise invalid(message, "id", "invalid_value")
    return RequestLine(str(given), None, body)


def urls_of(recipe: Recipe) -> tuple[Endpoint, ...]:
    """Return where requests of a model may belong, by what it makes."""
    return (IMAGES, EDITS) if recipe.frames is None else (VIDEOS,)


def url_of(recipe: Recipe, fields: Collection[str]) -> Endpoint:
    """Return where a request with these fields belongs: one with a picture is an edit."""
    first, *others = urls_of(recipe)
    return EDITS if EDITS in others and "image" in fields else first


def background_order(
    url: Endpoint, body: dict[str, Any], recipe_of: RecipeOf, default_seed: int | None = None, is_text: bool = False
) -> ImageOrder:
    """Read the fields of a request that no client waits for. Decoding the picture of an edit takes a while.

    Further arguments are those of `order_from_fields`.

    Raises:
        InvalidRequestError, APIError: the request cannot be served as it is.
    """
    if url == EDITS:
        order = edit_order_from_fields(body, recipe_of, default_seed=default_seed, is_text=is_text)
    else:
        read = order_from_fields if url == IMAGES else video_order_from_fields
        order = read(body, recipe_of, default_seed, is_text)
    waits = {"stream": order.delivery.is_streamed, "latency_budget_ms": order.delivery.latency_budget_ms is not None}
    for field, is_asked in waits.items():
        if is_asked:
            raise invalid(f"{field} has no use in the background; leave it out of a batch", field, "invalid_value")
    return order


def _decoded_object(line: bytes | Any) -> dict[str, Any]:
    raw = parse_json(line) if isinstance(line, bytes) else line
    if not isinstance(raw, dict):
        raise invalid(f"it is a JSON {type(raw).__name__}; send an object", None, "invalid_json")
    return raw
