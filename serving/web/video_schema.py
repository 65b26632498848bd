"""Requests and responses of /v1/videos."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from serving.errors import invalid
from serving.jobs.job import Job
from serving.schema.image_request import PROMPT_SCHEMA, SEED_SCHEMA, SIZE_SCHEMA, RecipeOf, order_from_fields
from serving.schema.order import ImageOrder
from serving.schema.parsing import nullable
from tdm_runtime.params import MAX_PROMPT_CHARACTERS, MAX_SEED, DecoderName, SamplingParams

MAX_SECONDS = 12
MAX_FPS = 30
WHOLE_NUMBERS = ("fps", "seed", "num_inference_steps")
"""Fields with a whole number, which a form sends as text."""
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
    seconds: str | int = Field(
        "4",
        description=f"A whole number, 1..{MAX_SECONDS}; OpenAI's are 4, 8 and 12.",
        json_schema_extra={"pattern": "^0?[1-9]$|^1[0-2]$", "minimum": 1, "maximum": MAX_SECONDS},
    )
    fps: int = Field(12, ge=1, le=MAX_FPS, description="Frames a second.")
    seed: int | None = Field(
        None, description=f"0..{MAX_SEED}; drawn by the server when absent.", json_schema_extra=SEED_SCHEMA
    )
    num_inference_steps: int | None = Field(None, description="One of the model's step counts, for every frame.")
    decoder: DecoderName = Field("full", description="tiny decodes several times faster and a little softer.")
    strict: bool = Field(False, description="The same file for the same request, on one backend; slower.")

    @property
    def num_seconds(self) -> int:
        """Length of the clip.

        Raises:
            APIError: 400, it is not within the limits.
        """
        text = str(self.seconds)
        if not re.fullmatch(r"[0-9]{1,2}", text, re.ASCII) or not 1 <= int(text) <= MAX_SECONDS:
            message = f"seconds is {text[:32]!r}; it must be a whole number from 1 to {MAX_SECONDS}"
            raise invalid(message, "seconds", "invalid_value")
        return int(text)

    def to_order(self, recipe_of: RecipeOf) -> ImageOrder:
        """Return the order of the first frame.

        Raises:
            InvalidRequestError, APIError: a value outside its limits.
        """
        fields = self.model_dump(exclude={"seconds", "fps"})
        return order_from_fields(fields, recipe_of)


def from_form(fields: dict[str, str]) -> dict[str, Any]:
    """Convert the numbers and truth values of a form. Other text stays as it is and fails validation later."""
    converted: dict[str, Any] = {
        name: int(text) if name in WHOLE_NUMBERS and re.fullmatch(r"-?[0-9]{1,20}", text, re.ASCII) else text
        for name, text in fields.items()
    }
    if (strict := fields.get("strict")) in TRUTH_VALUES:
        converted["strict"] = TRUTH_VALUES[strict]
    return converted


def to_job_request(params: SamplingParams, request: VideoRequest) -> dict[str, Any]:
    """Return what the database keeps of a clip's request."""
    sampling = asdict(params)
    del sampling["noise_angle"]  # each frame has its own
    return {"sampling": sampling, "seconds": request.num_seconds, "fps": request.fps, "strict": request.strict}


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
    """Percentage of frames that are finished."""
    created_at: int
    completed_at: int | None
    expires_at: int | None
    """Time when the clip and its files are deleted, Unix seconds."""
    error: VideoError | None
    prompt: str
    size: str
    seconds: str
    remixed_from_video_id: None = None
    motion: Literal["noise_walk"] = "noise_walk"
    """How frames differ: each is a picture of its own, from noise that walks once around a circle."""
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


def to_video(job: Job) -> Video:
    """Return a job in the shape of the API."""
    sampling = job.request["sampling"]
    assert job.status != "cancelled", "a clip is deleted, not cancelled"
    return Video(
        id=job.id,
        model=job.model,
        status=job.status,
        progress=100 if job.status == "completed" else 99 * job.num_done // job.num_parts,
        created_at=int(job.created_at),
        completed_at=int(job.completed_at) if job.completed_at is not None and job.status == "completed" else None,
        expires_at=int(job.expires_at) if job.is_finished else None,
        error=None if job.error_code is None else VideoError(code=job.error_code, message=job.error_message or ""),
        prompt=sampling["prompt"],
        size=f"{sampling['width']}x{sampling['height']}",
        seconds=str(job.request["seconds"]),
        fps=job.request["fps"],
        num_frames=job.num_parts,
        seed=sampling["seed"],
        num_inference_steps=sampling["num_inference_steps"],
    )
