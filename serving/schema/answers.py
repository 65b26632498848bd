"""What the service gives its fronts, before any of them puts it on its wire."""

from __future__ import annotations

from dataclasses import dataclass

from tdm_runtime.media.image_file import ImageFormat
from tdm_runtime.media.receipt import Receipt


@dataclass(frozen=True)
class InputTokenDetails:
    """Prompt tokens by kind."""

    text_tokens: int
    image_tokens: int = 0


@dataclass(frozen=True)
class Usage:
    """Prompt tokens read, and latent positions made."""

    input_tokens: int
    input_tokens_details: InputTokenDetails
    output_tokens: int
    total_tokens: int


@dataclass(frozen=True)
class ImageTimings:
    """Where the time of the slowest picture went, in milliseconds."""

    queue_ms: float
    text_ms: float
    steps_ms: list[float]
    decode_ms: float
    encode_ms: float
    total_ms: float


@dataclass(frozen=True)
class MadeImage:
    """One picture."""

    content: bytes
    """A file; where pixels were asked for, uint8 [H, W, 3], row by row."""
    seed: int
    num_inference_steps: int
    """That were taken."""
    is_cached: bool
    """Whether it was made for an earlier request."""
    receipt: Receipt
    """What made it; `tdm-generate --verify` makes it again."""


@dataclass(frozen=True)
class ImageAnswer:
    """A request's pictures and how they came about."""

    created: int
    """Unix seconds."""
    model: str
    images: list[MadeImage]
    output_format: ImageFormat
    width: int
    height: int
    usage: Usage
    timings: ImageTimings
    predicted_ms: float
    """What `timings.total_ms` was expected to be when the first step was due."""
    latency_budget_kept: bool | None
    """None where there was none."""
    warnings: list[str]

    @property
    def size(self) -> str:
        return f"{self.width}x{self.height}"


@dataclass(frozen=True)
class PartialAnswer:
    """What is to be seen of a picture before it is done."""

    content: bytes
    """As of `MadeImage`."""
    index: int
    """Of the partial picture, from 0."""
    created: int
    """Unix seconds."""
    output_format: ImageFormat
    width: int
    height: int
    is_draft: bool
    """The picture of one step; otherwise what a step of the picture itself expects."""
    num_steps_taken: int
