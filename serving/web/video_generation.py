"""Request and answers of POST /v1/videos/generations: one clip, made while the client waits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, Field

from serving.errors import invalid
from serving.schema.answers import ImageAnswer, ImageTimings, PartialAnswer, Usage
from serving.schema.image_request import MAX_BUDGET_MS
from serving.schema.image_response import GeneratedImage, to_base64, to_files
from serving.schema.order import ImageOrder, ResponseFormat
from serving.web.video_schema import VideoFormat, VideoRequest
from tdm_runtime.checkpoint.recipe import Recipe
from tdm_runtime.media.image_file import ImageFormat
from tdm_runtime.media.receipt import Receipt


class VideoGenerationRequest(VideoRequest):
    """Body of POST /v1/videos/generations. Fields that pictures have too mean the same."""

    num_inference_steps: int | Literal["auto"] | None = Field(  # type: ignore[assignment]
        None,
        description='One of the model\'s step counts; "auto" takes as many as the latency budget and the load allow.',
    )
    min_inference_steps: int | None = Field(None, description='Fewest steps that "auto" may take.')
    latency_budget_ms: float | None = Field(
        None,
        gt=0,
        le=MAX_BUDGET_MS,
        description="Longest time from arrival to answer; refused at once if out of reach.",
    )
    response_format: ResponseFormat = Field("b64_json", description="url: the server keeps the file until expires_at.")
    user: str | None = Field(None, max_length=256, description="Accepted and unused.")
    stream: bool | None = Field(None, description="Answer with server-sent events: first frames, then the clip.")
    partial_images: int | None = Field(
        None, ge=0, le=3, description="With stream: most previews before the clip, each its first frame."
    )

    def as_file(self, formats: Sequence[VideoFormat]) -> VideoGenerationRequest:
        """Return the same request, answered with the bytes of its file.

        Args:
            formats: formats that the client accepts, the best first.

        Raises:
            APIError: 400, the request contradicts that.
        """
        if self.stream or self.response_format == "url":
            param = "stream" if self.stream else "response_format"
            message = f"{param} is {getattr(self, param)!r} and Accept asks for a file's bytes; leave one out"
            raise invalid(message, param, "invalid_value")
        if "output_format" not in self.model_fields_set:
            return self.model_copy(update={"output_format": formats[0]})
        if self.output_format not in formats:
            message = f"output_format is {self.output_format!r} and Accept says {formats[0]}; leave one out"
            raise invalid(message, "output_format", "invalid_value")
        return self

    def to_order(self, recipe: Recipe, default_seed: int | None = None) -> ImageOrder:
        """Return the order of the clip.

        Raises:
            InvalidRequestError, APIError: a value outside its limits, or the model makes pictures.
        """
        if recipe.frames is None:
            message = f"model is {recipe.name!r}, which makes pictures; /v1/videos makes a walk of them"
            raise invalid(message, "model", "invalid_value")
        return super().to_order(recipe, default_seed)


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
