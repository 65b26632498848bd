"""Requests of /v1/videos and of /v1/videos/generations, which makes one clip while the client waits."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from serving.errors import invalid
from serving.schema.image_request import (
    MAX_BUDGET_MS,
    PROMPT_SCHEMA,
    SEED_SCHEMA,
    SIZE_SCHEMA,
    ImageRequest,
    RecipeOf,
    Seed,
)
from serving.schema.order import ImageOrder, ResponseFormat
from serving.schema.parsing import nullable, validate
from serving.schema.prompt_tags import with_lora
from tdm_runtime.checkpoint.frame_rule import MAX_FRAMES, FrameRule
from tdm_runtime.checkpoint.recipe import Recipe
from tdm_runtime.params import MAX_PROMPT_CHARACTERS, MAX_SEED, DecoderName, PromptSyntax

MAX_SECONDS = 12
MAX_FPS = 30
WALK_SECONDS, WALK_FPS = 4, 12
"""Of a walk through the noise of a model that makes pictures, unless the request names them."""
MAX_WALK_FRAMES = MAX_SECONDS * MAX_FPS
VideoFormat = Literal["mp4", "webm", "webp", "gif"]


class PlannedClip(NamedTuple):
    """A clip that was asked for."""

    order: ImageOrder
    """Order of the clip, or of the first frame of a walk."""
    num_frames: int
    fps: int


class VideoRequest(BaseModel):
    """Body of POST /v1/videos, as JSON or as a form. Names follow OpenAI; sampling fields follow diffusers."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra=nullable)

    prompt: str = Field(
        description=f"What the clip shows, 1..{MAX_PROMPT_CHARACTERS} characters.", json_schema_extra=PROMPT_SCHEMA
    )
    prompt_syntax: PromptSyntax = Field("plain", description="As for pictures.")
    model: str | None = Field(None, description="Model id from /v1/models; the served model by default.")
    size: str = Field("auto", description='"WxH" from the model\'s sizes, or "auto".', json_schema_extra=SIZE_SCHEMA)
    seconds: str | int | None = Field(
        None,
        description=f"A whole number, 1..{MAX_SECONDS}; OpenAI's are 4, 8 and 12. By default the model's own length. "
        "The number of frames is the nearest that the model makes.",
        json_schema_extra={"pattern": "^0?[1-9]$|^1[0-2]$", "minimum": 1, "maximum": MAX_SECONDS},
    )
    num_frames: int | None = Field(None, ge=1, le=MAX_FRAMES, description="In place of seconds: the exact length.")
    fps: int | None = Field(None, ge=1, le=MAX_FPS, description="Frames a second; by default the model's own.")
    seed: Seed = Field(
        None, description=f"0..{MAX_SEED}; drawn by the server when absent or -1.", json_schema_extra=SEED_SCHEMA
    )
    num_inference_steps: int | None = Field(None, description="One of the model's step counts, for every frame.")
    decoder: DecoderName = Field("full", description="tiny decodes several times faster and a little softer.")
    guidance_scale: float | None = Field(None, description="As for pictures.")
    lora_scale: float | None = Field(None, description="As for pictures.")
    strict: bool = Field(False, description="The same file for the same request, on one backend; slower.")
    output_format: VideoFormat = Field("mp4", description="mp4 is H.264, webm VP9; webp and gif are animations.")

    def length(self, recipe: Recipe) -> tuple[int, int]:
        """Return the number of frames and the frames a second.

        Raises:
            APIError: 400, a value is not within the limits.
        """
        rule, fps = recipe.frames, self.fps or recipe.fps or WALK_FPS
        if self.num_frames is not None:
            if self.seconds is not None:
                message = f"num_frames is {self.num_frames} and seconds {self.seconds}; leave one out"
                raise invalid(message, "num_frames", "invalid_value")
            if rule is None and self.num_frames > MAX_WALK_FRAMES:
                message = f"num_frames is {self.num_frames}; {recipe.name} makes at most {MAX_WALK_FRAMES}"
                raise invalid(message, "num_frames", "invalid_value")
            if rule is not None and not rule.allows(self.num_frames):
                message = f"num_frames is {self.num_frames}; {recipe.name} makes {rule}"
                raise invalid(f"{message}: take {rule.nearest(self.num_frames)}", "num_frames", "invalid_value")
            return self.num_frames, fps
        if rule is None:
            return (WALK_SECONDS if self.seconds is None else self._num_seconds()) * fps, fps
        return (rule.default if self.seconds is None else _nearest(rule, self._num_seconds(), fps, recipe)), fps

    def _num_seconds(self) -> int:
        text = str(self.seconds)
        if not re.fullmatch(r"[0-9]{1,2}", text, re.ASCII) or not 1 <= int(text) <= MAX_SECONDS:
            message = f"seconds is {text[:32]!r}; it must be a whole number from 1 to {MAX_SECONDS}"
            raise invalid(message, "seconds", "invalid_value")
        return int(text)

    def plan(self, recipe: Recipe, default_seed: int | None = None) -> PlannedClip:
        """Check the request against its model and draw its seed.

        Args:
            default_seed: seed of a request that has none. None draws one.

        Raises:
            InvalidRequestError, APIError: a value outside its limits.
        """
        fields = self.model_dump(exclude={"seconds", "num_frames", "fps", "output_format"}, exclude_unset=True)
        frames, fps = self.length(recipe)
        request = validate(fields, ImageRequest)
        if recipe.frames is None:
            return PlannedClip(request.to_order(recipe, default_seed), frames, fps)
        order = request.to_order(recipe, default_seed, frames, fps)
        encoding = replace(order.encoding, output_format=self.output_format)
        return PlannedClip(replace(order, encoding=encoding), frames, fps)


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
            message += ", /v1/images/generations and gRPC's ImageService make one"
            raise invalid(message, "model", "invalid_value")
        return self.plan(recipe, default_seed).order


def video_order_from_fields(
    fields: dict[str, Any], recipe_of: RecipeOf, default_seed: int | None = None, is_text: bool = False
) -> ImageOrder:
    """Read decoded fields, named as in the JSON body of POST /v1/videos/generations.

    Arguments and errors are those of `order_from_fields`.
    """
    request = with_lora(validate(fields, VideoGenerationRequest, is_text), recipe_of)
    return request.to_order(recipe_of(request.model), default_seed)


def _nearest(rule: FrameRule, seconds: int, fps: int, recipe: Recipe) -> int:
    """Return the number of frames of a model's clip that is nearest to a time."""
    if seconds * fps >= rule.max_frames + rule.step:
        message = f"seconds is {seconds}, {seconds * fps} frames at {fps} fps; {recipe.name} makes {rule}"
        raise invalid(f"{message}: take fewer seconds or fps, or name num_frames", "seconds", "invalid_value")
    return rule.nearest(seconds * fps)
