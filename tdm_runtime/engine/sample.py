"""One picture in flight, and the picture that comes of it."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field, replace

from torch import Tensor

from tdm_runtime.engine.delivery import Delivery
from tdm_runtime.model.decoder import Pixels
from tdm_runtime.model.loaded_model import LoadedModel
from tdm_runtime.model.text_encoder import PromptEmbedding
from tdm_runtime.params import SamplingParams
from tdm_runtime.sampling.step_table import StepTable
from tdm_runtime.scheduling.work import Work


@dataclass
class Timings:
    """Where one picture's time went, in milliseconds; together, from submission to pixels.

    A batched call counts in full for each of its samples.
    """

    queue_ms: float = 0.0
    """Waiting while others were served: before the first call and between calls."""
    text_ms: float = 0.0
    steps_ms: list[float] = field(default_factory=list)
    decode_ms: float = 0.0
    waits_ms: list[float] = field(default_factory=list)
    """What `queue_ms` consists of: before the prompt, before each step and before decoding."""

    def wait(self, wait_ms: float) -> None:
        """Others were served for so long."""
        self.queue_ms += wait_ms
        self.waits_ms.append(wait_ms)

    @property
    def total_ms(self) -> float:
        """From submission to pixels."""
        return self.queue_ms + self.text_ms + sum(self.steps_ms) + self.decode_ms


@dataclass(frozen=True)
class Picture:
    """A finished picture."""

    params: SamplingParams
    """As it was made: the step count is the one that was taken."""
    pixels: Pixels
    """uint8 [H, W, 3], of a clip [F, H, W, 3]."""
    timings: Timings
    prompt: PromptEmbedding
    predicted_ms: float
    """From submission to pixels, as the engine expected when the first step was due."""
    is_strict: bool
    """Whether nobody's company can have changed a bit."""
    is_cached: bool = False
    """Whether it was made for an earlier request."""


@dataclass(eq=False, kw_only=True)
class Sample(Work):
    """A picture in flight: its own latents, its own steps."""

    model: LoadedModel
    params: SamplingParams
    """The step count is the one that is taken, once it is settled."""
    delivery: Delivery
    submitted_s: float
    """Monotonic."""
    ready_s: float
    """When it was submitted or its last call ended, monotonic."""
    future: Future[Picture] = field(default_factory=Future)
    draft_of: Sample | None = None
    """The sample that this one is a quick look at."""
    latents: Tensor | None = None
    """[C, H, W] or [C, F, H, W]; None until the first step is due."""
    denoised: Tensor | None = None
    """Denoised estimate of the previous step, same shape as latents."""
    prompt: PromptEmbedding | None = None
    timings: Timings = field(default_factory=Timings)

    @property
    def table(self) -> StepTable:
        return self.model.recipe.step_tables[self.params.num_inference_steps]

    @property
    def step_index(self) -> int:
        """Of the next step."""
        return self.params.num_inference_steps - self.steps_left

    @property
    def is_abandoned(self) -> bool:
        """Whether nobody waits for it any more."""
        return self.future.cancelled() or (self.draft_of is not None and self.draft_of.future.done())

    def settle(self, steps: int) -> None:
        super().settle(steps)
        self.params = replace(self.params, num_inference_steps=steps)
