"""Answers to image requests, before HTTP or gRPC encodes them."""

from __future__ import annotations

from dataclasses import dataclass

from tdm_runtime.media.image_file import ImageFormat
from tdm_runtime.media.made_file import FileFormat
from tdm_runtime.media.receipt import Receipt


@dataclass(frozen=True)
class InputTokenDetails:
    """Prompt tokens by kind."""

    text_tokens: int
    image_tokens: int = 0


@dataclass(frozen=True)
class Usage:
    """Number of prompt tokens that were read and of latent positions that were made."""

    input_tokens: int
    input_tokens_details: InputTokenDetails
    output_tokens: int
    total_tokens: int


@dataclass(frozen=True)
class ImageTimings:
    """Time of each stage of the slowest picture, in milliseconds."""

    queue_ms: float
    text_ms: float
    steps_ms: list[float]
    decode_ms: float
    encode_ms: float
    total_ms: float
    image_ms: float = 0.0
    """Encoding the given picture of an edit."""


@dataclass(frozen=True)
class MadeImage:
    """One picture."""

    content: bytes
    """A file of a picture or clip; with `ImageEncoding.pixels_only`, uint8 [H, W, 3] or [F, H, W, 3], row by row."""
    seed: int
    num_inference_steps: int
    """Step count K. An edit takes the last of its steps; `num_steps_taken` says how many."""
    num_steps_taken: int
    """Number of steps that were taken."""
    is_cached: bool
    """Whether the picture was made for an earlier request."""
    receipt: Receipt
    """Everything that determines the picture; `tdm-generate --verify` makes it again."""


@dataclass(frozen=True)
class ImageAnswer:
    """Pictures of a request, and how they were made."""

    created: int
    """Unix seconds."""
    model: str
    images: list[MadeImage]
    output_format: FileFormat
    width: int
    height: int
    usage: Usage
    timings: ImageTimings
    waits_ms: list[float]
    """Parts of `timings.queue_ms` in the engine, see `engine.sample.Timings`. Empty for a picture from the cache."""
    predicted_ms: float
    """Prediction of `timings.total_ms` when the first step was due."""
    latency_budget_kept: bool | None
    """Whether the answer was in time; None without a latency budget."""
    late_by: str | None
    """What took the most beyond its share of the budget: calls, hand-over or encoding. None: the answer was in time."""
    warnings: list[str]

    @property
    def size(self) -> str:
        return f"{self.width}x{self.height}"


@dataclass(frozen=True)
class PartialAnswer:
    """Draft or preview of a picture that is not finished."""

    content: bytes
    """An image file."""
    index: int
    """Number of the partial picture, from 0."""
    created: int
    """Unix seconds."""
    output_format: ImageFormat
    width: int
    height: int
    is_draft: bool
    """True for a picture of one step; False for what a step of the picture itself predicts."""
    num_steps_taken: int
