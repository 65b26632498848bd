"""Requests and responses of /v1/videos."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from serving.errors import invalid
from serving.jobs.job import Job
from serving.jobs.video_job import request_of
from serving.schema.image_request import PROMPT_SCHEMA, SEED_SCHEMA, SIZE_SCHEMA, ImageRequest
from serving.schema.order import ImageOrder
from serving.schema.parsing import nullable, validate
from tdm_runtime.checkpoint.frame_rule import MAX_FRAMES, FrameRule
from tdm_runtime.checkpoint.recipe import Recipe
from tdm_runtime.params import MAX_PROMPT_CHARACTERS, MAX_SEED, DecoderName, SamplingParams

MAX_SECONDS = 12
MAX_FPS = 30
WALK_SECONDS, WALK_FPS = 4, 12
"""Of a walk through the noise of a model that makes pictures, unless the request names them."""
MAX_WALK_FRAMES = MAX_SECONDS * MAX_FPS
WHOLE_NUMBERS = ("fps", "num_frames", "seed", "num_inference_steps")
"""Fields with a whole number, which a form sends as text."""
NUMBERS = ("guidance_scale", "lora_scale")
"""Fields with a number, which a form sends as text."""
VideoFormat = Literal["mp4", "webp", "gif"]
TRUTH_VALUES = {"true": True, "false": False}
"""What a form sends for a field that is true or false."""
VideoVariant = Literal["video", "thumbnail", "spritesheet"]
POLL_AFTER_MS = 500


class VideoRequest(BaseModel):
    """Body of POST /v1/videos, as JSON or as a form. Names follow OpenAI; sampling fields follow diffusers."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra=nullable)

    prompt: str = Field(
        description=f"What the clip shows, 1..{MAX_PROMPT_CHARACTERS} characters.", json_schema_extra=PROMPT_SCHEMA
    )
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
    seed: int | None = Field(
        None, description=f"0..{MAX_SEED}; drawn by the server when absent.", json_schema_extra=SEED_SCHEMA
    )
    num_inference_steps: int | None = Field(None, description="One of the model's step counts, for every frame.")
    decoder: DecoderName = Field("full", description="tiny decodes several times faster and a little softer.")
    guidance_scale: float | None = Field(None, description="As for pictures.")
    lora_scale: float | None = Field(None, description="As for pictures.")
    strict: bool = Field(False, description="The same file for the same request, on one backend; slower.")
    output_format: VideoFormat = Field("mp4", description="mp4 is H.264; webp and gif are animations.")

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

    def to_order(self, recipe: Recipe, default_seed: int | None = None) -> ImageOrder:
        """Return the order of the clip, or of the first frame of a walk.

        Args:
            default_seed: seed of a request that has none. None draws one.

        Raises:
            InvalidRequestError, APIError: a value outside its limits.
        """
        fields = self.model_dump(exclude={"seconds", "num_frames", "fps", "output_format"}, exclude_unset=True)
        frames, fps = self.length(recipe)
        request = validate(fields, ImageRequest)
        if recipe.frames is None:
            return request.to_order(recipe, default_seed)
        order = request.to_order(recipe, default_seed, frames, fps)
        return replace(order, encoding=replace(order.encoding, output_format=self.output_format))


def _nearest(rule: FrameRule, seconds: int, fps: int, recipe: Recipe) -> int:
    """Return the number of frames of a model's clip that is nearest to a time."""
    if seconds * fps >= rule.max_frames + rule.step:
        message = f"seconds is {seconds}, {seconds * fps} frames at {fps} fps; {recipe.name} makes {rule}"
        raise invalid(f"{message}: take fewer seconds or fps, or name num_frames", "seconds", "invalid_value")
    return rule.nearest(seconds * fps)


def from_form(fields: dict[str, str]) -> dict[str, Any]:
    """Convert the numbers and truth values of a form. Other text stays as it is and fails validation later."""
    converted: dict[str, Any] = {
        name: int(text) if name in WHOLE_NUMBERS and re.fullmatch(r"-?[0-9]{1,20}", text, re.ASCII) else text
        for name, text in fields.items()
    }
    for name in NUMBERS:
        with suppress(ValueError):
            converted |= {name: float(fields[name])} if name in fields else {}
    if (strict := fields.get("strict")) in TRUTH_VALUES:
        converted["strict"] = TRUTH_VALUES[strict]
    return converted


def to_job_request(params: SamplingParams, request: VideoRequest, num_frames: int, fps: int) -> dict[str, Any]:
    """Return what the database keeps of a clip's request."""
    sampling = asdict(params)
    del sampling["noise_angle"]  # each frame of a walk has its own
    seconds = int(request.seconds) if request.seconds is not None else max(1, round(num_frames / fps))
    kept = {"strict": request.strict, "output_format": request.output_format}
    return {"sampling": sampling, "seconds": seconds, "num_frames": num_frames, "fps": fps, **kept}


class VideoError(BaseModel):
    """Reason why a clip failed."""

    code: str
    message: str


class Video(BaseModel):
    """A clip, finished or not."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int
    """Percentage of steps that are taken; in a walk, of frames that are finished."""
    created_at: int
    completed_at: int | None
    expires_at: int | None
    """Time when the clip and its files are deleted, Unix seconds."""
    error: VideoError | None
    prompt: str
    size: str
    seconds: str
    remixed_from_video_id: None = None
    motion: Literal["model", "noise_walk"]
    """Who moves: a model that makes clips; or noise_walk, where each frame is a picture of its own, from noise that
    walks once around a circle."""
    output_format: VideoFormat
    fps: int
    num_frames: int
    seed: int
    num_inference_steps: int


class VideoList(BaseModel):
    """Answer of GET /v1/videos."""

    object: Literal["list"] = "list"
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedVideo(BaseModel):
    """Answer of DELETE /v1/videos/{id}."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True


def _progress(job: Job) -> int:
    if job.status == "completed":
        return 100
    done = job.num_done + job.result.get("progress", 0.0) if job.status == "in_progress" else job.num_done
    return int(99 * min(1.0, done / job.num_parts))


def to_video(job: Job) -> Video:
    """Return a job in the shape of the API."""
    request = request_of(job)
    sampling = request["sampling"]
    assert job.status != "cancelled", "a clip is deleted, not cancelled"
    return Video(
        id=job.id,
        model=job.model,
        status=job.status,
        progress=_progress(job),
        created_at=int(job.created_at),
        completed_at=int(job.completed_at) if job.completed_at is not None and job.status == "completed" else None,
        expires_at=int(job.expires_at) if job.is_finished else None,
        error=None if job.error_code is None else VideoError(code=job.error_code, message=job.error_message or ""),
        prompt=sampling["prompt"],
        size=f"{sampling['width']}x{sampling['height']}",
        seconds=str(request["seconds"]),
        motion="noise_walk" if sampling["frames"] is None else "model",
        output_format=request["output_format"],
        fps=request["fps"],
        num_frames=request["num_frames"],
        seed=sampling["seed"],
        num_inference_steps=sampling["num_inference_steps"],
    )
