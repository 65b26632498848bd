"""`Sample`: a picture in flight. `Picture`: the finished picture."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

from torch import Tensor

from tdm_runtime.engine.delivery import Delivery, Preview
from tdm_runtime.families.conditioning import Conditioning
from tdm_runtime.model.decoder import Pixels
from tdm_runtime.model.encoder import PictureEncoder
from tdm_runtime.model.loaded_model import LoadedModel
from tdm_runtime.model.text_encoder import PromptEmbedding, PromptKey, TextEncoder
from tdm_runtime.params import SamplingParams
from tdm_runtime.sampling.known_picture import KnownPicture
from tdm_runtime.sampling.noise import SeedNoise
from tdm_runtime.sampling.step_table import StepTable
from tdm_runtime.scheduling.work import Work


@dataclass
class Timings:
    """Stages of one picture in milliseconds. They add up to the time from submission to pixels.

    A batched call counts in full for each of its samples.
    """

    queue_ms: float = 0.0
    """Time spent waiting: before the first call and between calls."""
    text_ms: float = 0.0
    image_ms: float = 0.0
    """Time of encoding given pictures."""
    steps_ms: list[float] = field(default_factory=list)
    decode_ms: float = 0.0
    waits_ms: list[float] = field(default_factory=list)
    """Parts of `queue_ms`: the wait before prompt and given picture, before each step and before decoding."""

    def wait(self, wait_ms: float, *, before_steps: bool = False) -> None:
        """Add a wait before the next step, before the decoder once all steps are taken, or before the first step."""
        stage = 0 if before_steps else 1 + len(self.steps_ms)
        self.waits_ms += [0.0] * (1 + stage - len(self.waits_ms))
        self.waits_ms[stage] += wait_ms
        self.queue_ms += wait_ms

    @property
    def total_ms(self) -> float:
        """Time from submission to pixels."""
        return self.queue_ms + self.text_ms + self.image_ms + sum(self.steps_ms) + self.decode_ms


@dataclass(frozen=True)
class Picture:
    """A finished picture."""

    params: SamplingParams
    """Parameters of the picture; `num_inference_steps` is the number of steps actually taken."""
    pixels: Pixels
    """uint8 [H, W, 3]; for a clip [F, H, W, 3]."""
    timings: Timings
    prompt: PromptEmbedding
    predicted_ms: float
    """Time from submission to pixels that the engine predicted when the first step was due."""
    is_strict: bool
    """Whether the picture has the same bits alone and in any batch."""
    is_cached: bool = False
    """Whether it comes from the result cache."""


@dataclass(eq=False, kw_only=True)
class Sample(Work):
    """A picture in flight, with its latents and its steps."""

    model: LoadedModel
    params: SamplingParams
    """Parameters of the picture; under "auto" the step count is final once the first step is due."""
    delivery: Delivery
    submitted_s: float
    """Time of submission, monotonic."""
    ready_s: float
    """Time of submission, or end of its latest call; monotonic."""
    future: Future[Picture] = field(default_factory=Future)
    open_counts: tuple[int, ...] = ()
    """Step counts K to choose from, ascending; empty without a choice."""
    draft_of: Sample | None = None
    """The sample whose one-step draft this is; None for a picture."""
    held: list[Preview] | None = None
    """Previews that wait until its draft was shown; None if no draft is due."""
    latents: Tensor | None = None
    """[C, H, W] or [C, F, H, W]; None until the first step is due."""
    denoised: Tensor | None = None
    """Denoised estimate of the previous step, same shape as latents."""
    denoised_before: Tensor | None = None
    """Denoised estimate of the step before that, same shape as latents."""
    noise: SeedNoise | None = None
    """Noise of its seed; it draws when a step takes some. None until the first step is due."""
    known: KnownPicture | None = None
    """Given picture of an edit, in latents; None until the first step is due."""
    prompt: PromptEmbedding | None = None
    decoding: Iterator[Pixels | None] | None = None
    """Its decode, once begun, where it takes more than one call."""
    conditioning: Conditioning | None = None
    """What the denoiser reads of prompt, size and references; None until the first step is due."""
    timings: Timings = field(default_factory=Timings)

    @property
    def table(self) -> StepTable:
        """Steps that it takes in all."""
        return self.model.step_table(self.params)

    @property
    def prompt_key(self) -> tuple[TextEncoder, PromptKey]:
        """What its embedding depends on: samples of one key share it."""
        return self.model.text_encoder, self.model.prompt_key(self.params)

    @property
    def picture_key(self) -> tuple[PictureEncoder | None, tuple[str, ...]]:
        """What the latents of its given pictures depend on: edits of one key share them."""
        return self.model.encoder, tuple(one.picture_key for one in self.params.given_pictures)

    @property
    def step_index(self) -> int:
        """Index of the next step."""
        return self.params.num_steps - self.steps_left

    @property
    def is_abandoned(self) -> bool:
        """Whether its caller cancelled it, or its picture is finished and needs no draft."""
        return self.future.cancelled() or (self.draft_of is not None and self.draft_of.future.done())

    def settle(self, steps: int) -> None:
        """Fix the number of steps that run. Of an edit's step counts K with this number, it takes the largest."""
        super().settle(steps)
        edit = self.params.edit
        counts = [k for k in self.open_counts if (k if edit is None else edit.num_steps(k)) == steps]
        self.params = replace(self.params, num_inference_steps=counts[-1])

    def shown(self, pixels: Pixels) -> Pixels:
        """Return decoded pixels, with those of a given picture where a mask keeps it."""
        return pixels if self.params.edit is None else self.params.edit.blended(pixels)

    def after_step(self, latents: Tensor) -> Tensor:
        """Return the latents after its next step, with the given picture where a mask keeps it."""
        return latents if self.known is None else self.known.after_step(latents, self.table, self.step_index)
