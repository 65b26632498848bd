"""Clips of an image model: each frame starts from other noise on a closed path."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image

from serving.images.interface import Images
from serving.jobs.artifacts import ArtifactStore
from serving.jobs.job import FinishedPart, Job, Part
from serving.schema.order import DeliveryOptions, ImageOrder
from tdm_runtime.media.image_file import encode_image
from tdm_runtime.media.video_file import encode_clip
from tdm_runtime.model.decoder import Pixels
from tdm_runtime.params import SamplingParams

SHEET_SIDE = 4
"""Number of rows, and of columns, of a spritesheet."""


def frame_parts(num_frames: int) -> list[dict[str, Any]]:
    """Return the angle of each frame on the seed's circle of noise. The circle leads from the last to the first."""
    return [{"noise_angle": math.tau * frame / num_frames} for frame in range(num_frames)]


class VideoRenderer:
    """Makes clips. A part is one frame, a picture whose noise is close to the noise of its neighbours."""

    def __init__(self, images: Images, artifacts: ArtifactStore, keep_s: float) -> None:
        self._images = images
        self._artifacts = artifacts
        self._keep_s = keep_s

    def num_pictures(self, part: Part) -> int:
        """Return 1: a part is one frame."""
        return 1

    async def make(self, job: Job, part: Part) -> FinishedPart:
        """Make a frame as a PNG with its receipt.

        Raises:
            Exception: see `Images.generate`.
        """
        frame = SamplingParams(**job.request["sampling"], **part.request)
        delivery = DeliveryOptions(strict=job.request["strict"], is_background=True)
        answer = await self._images.generate(ImageOrder(job.model, (frame,), delivery))
        return FinishedPart(part.position, answer.images[0].content, is_failed=False)

    def finish(self, job: Job, parts: Callable[[], Iterator[FinishedPart]]) -> dict[str, Any]:
        """Write the clip, its first frame and its spritesheet to files. Returns their ids."""
        sampling, fps = job.request["sampling"], job.request["fps"]
        clip = encode_clip(
            (_pixels(part) for part in parts()), fps, sampling["width"], sampling["height"], sampling["prompt"]
        )
        expires_at = int(time.time() + self._keep_s)
        return {
            "video": self._artifacts.put(clip, "mp4", expires_at),
            "thumbnail": self._artifacts.put(next(parts()).content, "png", expires_at),
            "spritesheet": self._artifacts.put(_spritesheet(parts(), job.num_parts), "png", expires_at),
        }

    def discard(self, result: Mapping[str, Any]) -> None:
        for name in result.values():
            self._artifacts.delete(name)


def _pixels(part: FinishedPart) -> Pixels:
    with Image.open(io.BytesIO(part.content)) as picture:
        return np.asarray(picture.convert("RGB"))


def _spritesheet(parts: Iterator[FinishedPart], num_parts: int) -> bytes:
    """Return a picture of evenly spaced frames, row by row. A short clip repeats frames; no place stays empty."""
    sheet: Pixels | None = None
    for part in parts:
        places = [place for place in range(SHEET_SIDE**2) if num_parts * place // SHEET_SIDE**2 == part.position]
        if not places:
            continue
        pixels = _pixels(part)
        height, width, _ = pixels.shape
        if sheet is None:
            sheet = np.zeros((SHEET_SIDE * height, SHEET_SIDE * width, 3), np.uint8)
        for place in places:
            top, left = place // SHEET_SIDE * height, place % SHEET_SIDE * width
            sheet[top : top + height, left : left + width] = pixels
    assert sheet is not None, "a clip has frames"
    return encode_image(sheet, "png")
