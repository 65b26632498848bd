"""Clips: of a model that makes clips, or a walk of a model that makes pictures, whose frames start from other noise on
a closed path."""

from __future__ import annotations

import asyncio
import io
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, cast, get_args

import numpy as np
from PIL import Image

from serving.images.interface import Images
from serving.jobs.artifacts import ArtifactStore
from serving.jobs.job import FinishedPart, Job, Part
from serving.schema.answers import ImageAnswer
from serving.schema.order import DeliveryOptions, ImageEncoding, ImageOrder
from tdm_runtime.media.image_file import encode_image
from tdm_runtime.media.provenance import Provenance
from tdm_runtime.media.video_file import ClipFormat, Container, encode_clip, encode_frames, read_frames
from tdm_runtime.model.decoder import Pixels
from tdm_runtime.params import SamplingParams

MAX_PREVIEWS = 3
"""Most previews of a stream (`DeliveryOptions.num_previews`)."""
SHEET_SIDE = 4
"""Number of rows, and of columns, of a spritesheet."""


def frame_parts(num_frames: int) -> list[dict[str, Any]]:
    """Return the angle of each frame on the seed's circle of noise. The circle leads from the last to the first."""
    return [{"noise_angle": math.tau * frame / num_frames} for frame in range(num_frames)]


def request_of(job: Job) -> dict[str, Any]:
    """Return the request of a clip. One that version 0.1 stored is a walk and an MP4."""
    request: dict[str, Any] = {"num_frames": job.num_parts, "output_format": "mp4"} | job.request
    return request | {"sampling": {"frames": None} | request["sampling"]}


class VideoRenderer:
    """Makes clips. A part is a whole clip; of a walk it is one frame, whose noise is close to its neighbours' noise."""

    def __init__(
        self,
        images: Images,
        artifacts: ArtifactStore,
        keep_s: float,
        report: Callable[[Job, float], None],
        provenance: Provenance,
    ) -> None:
        """
        Args:
            report: Keeps how far a part is, 0 to 1. Blocks. See `JobStore.report`.
            provenance: of the files that are put together here. Frames have its watermark already.
        """
        self._images = images
        self._artifacts = artifacts
        self._keep_s = keep_s
        self._report = report
        self._provenance = provenance

    def num_pictures(self, part: Part) -> int:
        """Return 1: a part is one sample of the engine."""
        return 1

    async def make(self, job: Job, part: Part) -> FinishedPart:
        """Make a clip's file, or a frame as a PNG with its receipt.

        Raises:
            Exception: see `Images.generate`.
        """
        request = request_of(job)
        params = SamplingParams(**request["sampling"], **part.request)
        delivery = DeliveryOptions(strict=request["strict"], is_background=True)
        if params.frames is None:
            answer = await self._images.generate(ImageOrder(job.model, (params,), delivery))
        else:
            delivery = replace(
                delivery, is_streamed=True, num_previews=min(MAX_PREVIEWS, params.num_inference_steps - 1)
            )
            order = ImageOrder(job.model, (params,), delivery, ImageEncoding(request["output_format"]))
            answer = await self._make_clip(job, order)
        return FinishedPart(part.position, answer.images[0].content, is_failed=False)

    async def _make_clip(self, job: Job, order: ImageOrder) -> ImageAnswer:
        """Make a clip. Each preview tells how many steps are taken."""
        (params,) = order.pictures
        async for event in await self._images.stream(order):
            if isinstance(event, ImageAnswer):
                return event
            await asyncio.to_thread(self._report, job, event.num_steps_taken / params.num_inference_steps)
        raise AssertionError("a stream ends with its answer")

    def finish(self, job: Job, parts: Callable[[], Iterator[FinishedPart]]) -> dict[str, Any]:
        """Write the clip, its first frame and its spritesheet to files. Returns their ids."""
        request, expires_at = request_of(job), int(time.time() + self._keep_s)
        params = SamplingParams(**request["sampling"])
        first = next(parts()).content
        if params.frames is not None:
            clip, thumbnail = first, self._png(next(read_frames(first)), params)
            sheet = _spritesheet(read_frames(first), request["num_frames"])
        else:
            frames = (_pixels(part) for part in parts())
            clip = _walk(frames, request["output_format"], request["fps"], params.prompt)
            clip = self._provenance.signed(clip, request["output_format"], params)
            thumbnail, sheet = first, _spritesheet((_pixels(part) for part in parts()), request["num_frames"])
        return {
            "video": self._artifacts.put(clip, request["output_format"], expires_at),
            "thumbnail": self._artifacts.put(thumbnail, "png", expires_at),
            "spritesheet": self._artifacts.put(self._png(sheet, params), "png", expires_at),
        }

    def _png(self, pixels: Pixels, params: SamplingParams) -> bytes:
        """Return the file of a picture that is made from frames."""
        height, width, _ = pixels.shape
        content = encode_image(self._provenance.marked(pixels), "png")
        return self._provenance.signed(content, "png", replace(params, width=width, height=height))

    def discard(self, result: Mapping[str, Any]) -> None:
        for name in result.values():
            self._artifacts.delete(name)


def _pixels(part: FinishedPart) -> Pixels:
    with Image.open(io.BytesIO(part.content)) as picture:
        return np.asarray(picture.convert("RGB"))


def _walk(frames: Iterator[Pixels], output_format: ClipFormat, fps: int, prompt: str) -> bytes:
    """Return the file of a walk. MP4 and WebM need one frame in memory at a time, the others need all."""
    if output_format in get_args(Container):
        first = next(frames)
        height, width, _ = first.shape
        container = cast(Container, output_format)
        return encode_clip(itertools.chain([first], frames), fps, width, height, prompt, container)
    return encode_frames(np.stack(list(frames)), output_format, fps, prompt)


def _spritesheet(frames: Iterator[Pixels], num_frames: int) -> Pixels:
    """Return a picture of evenly spaced frames, row by row. A short clip repeats frames; no place stays empty."""
    sheet: Pixels | None = None
    for position, pixels in enumerate(frames):
        places = [place for place in range(SHEET_SIDE**2) if num_frames * place // SHEET_SIDE**2 == position]
        if not places:
            continue
        height, width, _ = pixels.shape
        if sheet is None:
            sheet = np.zeros((SHEET_SIDE * height, SHEET_SIDE * width, 3), np.uint8)
        for place in places:
            top, left = place // SHEET_SIDE * height, place % SHEET_SIDE * width
            sheet[top : top + height, left : left + width] = pixels
    assert sheet is not None, "a clip has frames"
    return sheet
