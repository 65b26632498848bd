"""Answers of POST /v1/images/generations: JSON, and the events of a stream."""

from __future__ import annotations

import base64
from typing import Literal, cast

from pydantic import BaseModel

from serving.schema.answers import ImageAnswer, ImageTimings, PartialAnswer, Usage
from tdm_runtime.media.image_file import ImageFormat
from tdm_runtime.media.receipt import Receipt


class GeneratedImage(BaseModel):
    """One picture, or one clip."""

    b64_json: str | None = None
    url: str | None = None
    """URL of the file, which needs no key; valid until `expires_at`."""
    expires_at: int | None = None
    """Time when the URL expires, Unix seconds."""
    revised_prompt: str | None = None
    """Always null: the server does not rewrite prompts."""
    seed: int
    num_inference_steps: int
    """Step count K. An edit takes the last of its steps; `num_steps_taken` says how many."""
    num_steps_taken: int
    """Number of steps that were taken."""
    is_cached: bool
    """Whether the picture was made for an earlier request."""
    receipt: Receipt
    """Everything that determines the picture; `tdm-generate --verify` makes it again."""


class ImageResponse(BaseModel):
    """Answer of POST /v1/images/generations."""

    created: int
    data: list[GeneratedImage]
    model: str
    output_format: ImageFormat
    size: str
    background: Literal["opaque"] = "opaque"
    usage: Usage
    timings: ImageTimings
    predicted_ms: float
    """Prediction of `timings.total_ms` when the first step was due."""
    latency_budget_kept: bool | None
    """Whether the answer was in time; None without a latency budget."""
    warnings: list[str] = []


class ImageEvent(BaseModel):
    """Fields of every event of a stream."""

    b64_json: str
    created_at: int
    size: str
    quality: Literal["auto"] = "auto"
    background: Literal["opaque"] = "opaque"
    output_format: ImageFormat


class PartialImage(ImageEvent):
    """Event `image_generation.partial_image`."""

    type: Literal["image_generation.partial_image"] = "image_generation.partial_image"
    partial_image_index: int
    is_draft: bool
    """True for a picture of one step; False for what a step of the picture itself predicts."""
    num_steps_taken: int


class CompletedImage(ImageEvent):
    """Event `image_generation.completed`, with the fields of `ImageResponse` and its picture."""

    type: Literal["image_generation.completed"] = "image_generation.completed"
    seed: int
    num_inference_steps: int
    num_steps_taken: int
    is_cached: bool
    receipt: Receipt
    usage: Usage
    model: str
    timings: ImageTimings
    predicted_ms: float
    latency_budget_kept: bool | None
    warnings: list[str]


class PartialEdit(PartialImage):
    """Event `image_edit.partial_image`."""

    type: Literal["image_edit.partial_image"] = "image_edit.partial_image"  # type: ignore[assignment]


class CompletedEdit(CompletedImage):
    """Event `image_edit.completed`."""

    type: Literal["image_edit.completed"] = "image_edit.completed"  # type: ignore[assignment]


def to_base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def to_files(answer: ImageAnswer, urls: list[str] | None, expires_at: int | None) -> list[GeneratedImage]:
    """Return the files of an answer.

    Args:
        urls: their URLs, in their order. None puts the files into the body.
        expires_at: time when the URLs expire, Unix seconds.
    """
    return [
        GeneratedImage(
            b64_json=to_base64(image.content) if urls is None else None,
            url=None if urls is None else urls[n],
            expires_at=expires_at,
            seed=image.seed,
            num_inference_steps=image.num_inference_steps,
            num_steps_taken=image.num_steps_taken,
            is_cached=image.is_cached,
            receipt=image.receipt,
        )
        for n, image in enumerate(answer.images)
    ]


def to_response(answer: ImageAnswer, urls: list[str] | None, expires_at: int | None = None) -> ImageResponse:
    """Return an answer as the body of the HTTP response. Arguments are those of `to_files`."""
    return ImageResponse(
        created=answer.created,
        data=to_files(answer, urls, expires_at),
        model=answer.model,
        output_format=cast(ImageFormat, answer.output_format),
        size=answer.size,
        usage=answer.usage,
        timings=answer.timings,
        predicted_ms=answer.predicted_ms,
        latency_budget_kept=answer.latency_budget_kept,
        warnings=answer.warnings,
    )


def to_event(answer: PartialAnswer | ImageAnswer) -> PartialImage | CompletedImage:
    """Return a part of a stream as its event."""
    if isinstance(answer, PartialAnswer):
        return PartialImage(
            b64_json=to_base64(answer.content),
            created_at=answer.created,
            size=f"{answer.width}x{answer.height}",
            output_format=answer.output_format,
            partial_image_index=answer.index,
            is_draft=answer.is_draft,
            num_steps_taken=answer.num_steps_taken,
        )
    (image,) = answer.images
    return CompletedImage(
        b64_json=to_base64(image.content),
        created_at=answer.created,
        size=answer.size,
        output_format=cast(ImageFormat, answer.output_format),
        seed=image.seed,
        num_inference_steps=image.num_inference_steps,
        num_steps_taken=image.num_steps_taken,
        is_cached=image.is_cached,
        receipt=image.receipt,
        usage=answer.usage,
        model=answer.model,
        timings=answer.timings,
        predicted_ms=answer.predicted_ms,
        latency_budget_kept=answer.latency_budget_kept,
        warnings=answer.warnings,
    )


def to_edit_event(answer: PartialAnswer | ImageAnswer) -> PartialEdit | CompletedEdit:
    """Return a part of the stream of an edit as its event."""
    event = to_event(answer)
    kind = PartialEdit if isinstance(event, PartialImage) else CompletedEdit
    return kind.model_validate(event.model_dump(exclude={"type"}))
