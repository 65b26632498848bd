"""Forms and responses of /v1/videos."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import asdict
from typing import Any, Literal

from pydantic import BaseModel

from serving.jobs.job import Job
from serving.jobs.video_job import request_of
from serving.schema.video_request import PlannedClip, VideoFormat, VideoRequest

WHOLE_NUMBERS = ("fps", "num_frames", "seed", "num_inference_steps")
"""Fields with a whole number, which a form sends as text."""
NUMBERS = ("guidance_scale", "lora_scale")
"""Fields with a number, which a form sends as text."""
TRUTH_VALUES = {"true": True, "false": False}
"""What a form sends for a field that is true or false."""
VideoVariant = Literal["video", "thumbnail", "spritesheet"]
POLL_AFTER_MS = 500


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


def to_job_request(plan: PlannedClip, request: VideoRequest) -> dict[str, Any]:
    """Return what the database keeps of a clip's request."""
    order, num_frames, fps = plan
    sampling = asdict(order.pictures[0])
    del sampling["noise_angle"]  # each frame of a walk has its own
    del sampling["edit"], sampling["references"]
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
