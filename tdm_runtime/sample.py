"""One picture in flight, and the picture that comes of it."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field

from torch import Tensor

from tdm_runtime.decoder import Pixels
from tdm_runtime.params import SamplingParams
from tdm_runtime.step_table import StepTable
from tdm_runtime.text_encoder import PromptEmbedding


@dataclass
class Timings:
    """Where one picture's time went, in milliseconds; together, from submission to pixels.

    A batched step counts in full for each of its samples.
    """

    queue_ms: float = 0.0
    """From submission to the start of text encoding, and between steps that others took."""
    text_ms: float = 0.0
    steps_ms: list[float] = field(default_factory=list)
    decode_ms: float = 0.0
    """Waiting for the decoder counted in."""


@dataclass(frozen=True)
class Picture:
    """A finished picture."""

    params: SamplingParams
    pixels: Pixels
    """uint8 [H, W, 3]."""
    timings: Timings
    prompt: PromptEmbedding


@dataclass(eq=False)
class Sample:
    """A picture in flight: its own latents, its own step index."""

    params: SamplingParams
    table: StepTable
    bucket: tuple[int, ...]
    """Latent shape [C, H, W]."""
    urgency: tuple[float, int]
    """(deadline in monotonic seconds, order of arrival)."""
    waiting_since_s: float
    """When it was submitted, prepared or last stepped, on the monotonic clock."""
    future: Future[Picture] = field(default_factory=Future)
    step_index: int = 0
    latents: Tensor | None = None
    """[C, H, W] once the first step is due."""
    denoised: Tensor | None = None
    """Of the step before, [C, H, W]."""
    prompt: PromptEmbedding | None = None
    timings: Timings = field(default_factory=Timings)

    @property
    def is_finished(self) -> bool:
        return self.step_index == self.table.num_inference_steps
