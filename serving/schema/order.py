"""An image request after the schema has read and checked it. Everything behind the schema works with this type."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from tdm_runtime.media.made_file import FileFormat
from tdm_runtime.params import SamplingParams

ResponseFormat = Literal["b64_json", "url"]


@dataclass(frozen=True)
class DeliveryOptions:
    """When the pictures are wanted, and what is shown before they are done."""

    latency_budget_ms: float | None = None
    """Longest time from arrival to answer, in milliseconds. None sets no limit."""
    min_inference_steps: int | None = None
    """Fewest steps that the engine may take; `SamplingParams.num_inference_steps` is then the most. None takes exactly
    that number of steps."""
    strict: bool = False
    """Whether the picture must have the same bits alone and in any batch, on one backend."""
    is_streamed: bool = False
    """Whether the answer is a stream: previews, then the picture."""
    num_previews: int = 0
    """Number of steps whose preview is sent, counted from the first step; 0 to 3."""
    draft: bool = False
    """Whether the picture of one step is made and sent first."""
    is_background: bool = False
    """Whether all other requests come first. Jobs set it."""


@dataclass(frozen=True)
class ImageEncoding:
    """How a finished picture or clip is written."""

    output_format: FileFormat = "png"
    compression: int = 100
    """Quality of jpeg and webp, 0 to 100."""
    metadata: bool = True
    """Whether the file contains the parameters and the receipt."""
    response_format: ResponseFormat = "b64_json"
    """Whether the answer contains the picture or a URL of it."""
    pixels_only: bool = False
    """Whether the content is bare pixels, uint8 [H, W, 3] or [F, H, W, 3], in place of a file."""


@dataclass(frozen=True)
class ImageOrder:
    """One image request. It can be pickled, and the same order always makes the same pictures."""

    model: str
    """Name of a served model."""
    pictures: tuple[SamplingParams, ...]
    """Parameters of each picture, with its seed. They differ only in the seed."""
    delivery: DeliveryOptions = DeliveryOptions()
    encoding: ImageEncoding = ImageEncoding()
    warnings: tuple[str, ...] = ()
    """What the client should know about its request."""

    @property
    def cost(self) -> float:
        """What the order takes of a quota, in megapixel-steps; with an open step count, the most it can take.

        Each frame of a clip and each reference count as a picture of their size.
        """
        return sum(_pixels(one) * one.num_steps for one in self.pictures) / 1e6

    def warned(self, *warnings: str) -> ImageOrder:
        """Return the same order with further warnings."""
        return replace(self, warnings=(*self.warnings, *warnings))

    def as_pixels(self) -> ImageOrder:
        """Return the same order, answered with bare pixels in place of files."""
        return replace(self, encoding=replace(self.encoding, pixels_only=True))

    def in_background(self) -> ImageOrder:
        """Return the same order as the work of a job."""
        return replace(self, delivery=replace(self.delivery, is_background=True))

    def within(self, latency_budget_ms: float) -> ImageOrder:
        """Return the same order with a latency budget, in milliseconds."""
        return replace(self, delivery=replace(self.delivery, latency_budget_ms=latency_budget_ms))


def _pixels(params: SamplingParams) -> int:
    """Return the number of pixels that each step works on."""
    references = sum(width * height for width, height in (one.size for one in params.references))
    return params.width * params.height * (params.frames or 1) + references
