"""Answers of POST /v1/videos/generations: JSON, and the events of a stream."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from serving.schema.answers import ImageAnswer, ImageTimings, PartialAnswer, Usage
from serving.schema.image_response import GeneratedImage, to_base64, to_files
from serving.schema.video_request import VideoFormat
from tdm_runtime.media.image_file import ImageFormat
from tdm_runtime.media.receipt import Receipt


class MadeVideo(BaseModel):
    """How a clip was made."""

    model: str
    output_format: VideoFormat
    size: str
    num_frames: int
    usage: Usage
    timings: ImageTimings
    predicted_ms: float
    """Prediction of `timings.total_ms` when the first step was due."""
    latency_budget_kept: bool | None
    """Whether the answer was in time; None without a latency budget."""
    warnings: list[str] = []


class VideoResponse(MadeVideo):
    """Answer of POST /v1/videos/generations."""

    created: int
    data: list[GeneratedImage]


class PartialVideo(BaseModel):
    """Event `video_generation.partial_image`: the first frame that a step predicts."""

    type: Literal["video_generation.partial_image"] = "video_generation.partial_image"
    b64_json: str
    created_at: int
    size: str
    output_format: ImageFormat
    partial_image_index: int
    num_steps_taken: int


class CompletedVideo(MadeVideo):
    """Event `video_generation.completed`, with the fields of `VideoResponse` and its clip."""

    type: Literal["video_generation.completed"] = "video_generation.completed"
    b64_json: str
    created_at: int
    seed: int
    num_inference_steps: int
    is_cached: bool
    receipt: Receipt


def to_response(answer: ImageAnswer, urls: list[str] | None, expires_at: int | None) -> VideoResponse:
    """Return an answer as the body of the HTTP response. Arguments are those of `to_files`."""
    return VideoResponse(created=answer.created, data=to_files(answer, urls, expires_at), **_how_made(answer))


def to_event(answer: PartialAnswer | ImageAnswer) -> PartialVideo | CompletedVideo:
    """Return a part of a stream as its event."""
    if isinstance(answer, ImageAnswer):
        (clip,) = answer.images
        return CompletedVideo(
            b64_json=to_base64(clip.content),
            created_at=answer.created,
            seed=clip.seed,
            num_inference_steps=clip.num_inference_steps,
            is_cached=clip.is_cached,
            receipt=clip.receipt,
            **_how_made(answer),
        )
    return PartialVideo(
        b64_json=to_base64(answer.content),
        created_at=answer.created,
        size=f"{answer.width}x{answer.height}",
        output_format=answer.output_format,
        partial_image_index=answer.index,
        num_steps_taken=answer.num_steps_taken,
    )


def _how_made(answer: ImageAnswer) -> dict[str, Any]:
    """Return the fields of `MadeVideo`."""
    known = {name: getattr(answer, name) for name in MadeVideo.model_fields if name != "num_frames"}
    return known | {"num_frames": answer.images[0].receipt.frames}
