"""`Sampling`: the fields of a recipe that say how it is sampled, and nothing about which checkpoint it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Literal

from tdm_runtime.checkpoint.frame_rule import FrameRule
from tdm_runtime.checkpoint.recipe import Recipe
from tdm_runtime.sampling.schedule import Array, NoiseSchedule
from tdm_runtime.sampling.size_shift import SizeShift
from tdm_runtime.sampling.solvers import Solver
from tdm_runtime.sampling.step_table import LCM_TIMESTEP_SCALING, PredictionType


@dataclass(frozen=True)
class Sampling:
    """Solver, schedule and lists of some step counts. The fields have the meaning of those of `Recipe`."""

    prediction_type: PredictionType
    noise_schedule: NoiseSchedule
    solver: Solver
    timesteps: Mapping[int, tuple[float, ...]]
    sigmas: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    next_timesteps: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    size_shift: SizeShift | None = None
    initial_scale: float | Literal["sigma"] = 1.0
    eta: float = 0.0
    timestep_scaling: float = LCM_TIMESTEP_SCALING

    def recipe(
        self,
        name: str,
        default_steps: int,
        native_sizes: tuple[tuple[int, int], ...],
        guidance_scale: float | None = None,
        clip: tuple[FrameRule, int] | None = None,
        files: Mapping[str, str] = {},
    ) -> Recipe:
        """Return the recipe of a checkpoint that is sampled so.

        Args:
            clip: frames and fps of a model that makes clips.
        """
        frames, fps = (None, None) if clip is None else clip
        return Recipe(
            name=name,
            default_steps=default_steps,
            native_sizes=native_sizes,
            guidance_scale=guidance_scale,
            frames=frames,
            fps=fps,
            files=files,
            **{f.name: getattr(self, f.name) for f in fields(self)},
        )


def lists_of(arrays: Mapping[int, Array]) -> Mapping[int, tuple[float, ...]]:
    """Return step count -> numbers, by rising step count."""
    return {k: tuple(array.tolist()) for k, array in sorted(arrays.items())}
