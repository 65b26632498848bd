"""`PublishedRecipe`: how a published checkpoint is sampled, as its publisher's example runs a stock pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from tdm_runtime.checkpoint.frame_rule import FrameRule
from tdm_runtime.checkpoint.recipe import Recipe
from tdm_runtime.checkpoint.stock.pipeline_call import ScheduleRequest
from tdm_runtime.checkpoint.stock.schedule import sampling_of
from tdm_runtime.checkpoint.stock.scheduler_config import SchedulerConfig

Settings = Mapping[str, Any]
Size = tuple[int, int]


def flow_match_euler(shift: float) -> Settings:
    """Return the scheduler config of a flow with a static shift."""
    return {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": shift}


@dataclass(frozen=True)
class PublishedRecipe:
    """How a published checkpoint is sampled."""

    name: str
    family: str
    """Name of the family."""
    checkpoint: str
    """Where it is published, on the Hugging Face hub."""
    scheduler: Settings
    """Scheduler config of the publisher's example."""
    steps: tuple[int, ...]
    default_steps: int
    size: Size
    """Default (width, height) in pixels."""
    stated: str
    """What the publisher's files or documentation state, as read; "" for nothing."""
    inferred: str
    """What was worked out, remembered, or read in the code of users: check it before you rely on it; "" for nothing."""
    timesteps: tuple[float, ...] | None = None
    """Argument `timesteps` of the example."""
    sigmas: tuple[float, ...] | None = None
    """Argument `sigmas` of the example."""
    trained_timesteps: tuple[float, ...] | None = None
    """Timesteps of the distillation, which the stock scheduler does not take; each step lands at the next one."""
    eta: float = 0.0
    """Argument `eta` of the example, which TCD reads."""
    guidance_scale: float | None = None
    """Guidance scale that the denoiser reads."""
    output_sign: Literal[1, -1] = 1
    """See `Recipe.output_sign`."""
    lora_scale: float | None = None
    """Scale of the LoRA that the checkpoint is; None for whole weights."""

    def recipe(
        self,
        name: str | None = None,
        size: Size | None = None,
        files: Mapping[str, str] = {},
        clip: tuple[FrameRule, int] | None = None,
    ) -> Recipe:
        """Return the recipe.

        Args:
            name: Name in requests; None is the entry's.
            size: (width, height) in pixels; None is the entry's.
            files: See `Recipe.files`.
            clip: Frames and fps of a model that makes clips.
        """
        steps = None if self.timesteps or self.sigmas else self.steps
        request = ScheduleRequest.of(self.family, steps, self.timesteps, self.sigmas, self.eta)
        sampling = sampling_of(SchedulerConfig.of(self.scheduler), request)
        if self.trained_timesteps is not None:
            lists = {len(self.trained_timesteps): self.trained_timesteps}
            sampling = replace(sampling, timesteps=lists, next_timesteps={}, sigmas={})
        recipe = sampling.recipe(
            name or self.name, self.default_steps, (size or self.size,), self.guidance_scale, clip, dict(files)
        )
        return replace(recipe, output_sign=self.output_sign)
