"""Latent consistency distillation (Luo et al. 2023), a baseline and the start of Fig. 8.

The loss makes f(x, t) = c_skip(t) x + c_out(t) x_0(x, t) equal at both ends of a teacher's step, Eq. (10).
The method needs real latents, and its sampler is stochastic.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tdm_runtime.families.conditioning import Conditioning
from training.methods.batch import Batch
from training.methods.losses import consistency_loss, consistency_scalings
from training.methods.roles import CleanEstimator, Guided
from training.methods.trajectory import Coordinates

GRID = 50
"""Timesteps of the teacher's solver. LCM skips T / 50 = 20 timesteps at a time."""


@dataclass(frozen=True)
class ConsistencyFunction:
    """f(x, t), which is the identity at the clean end for every network."""

    estimate: CleanEstimator

    def __call__(self, x: Tensor, timesteps: Tensor, conditioning: Conditioning, step_counts: Tensor | None) -> Tensor:
        """Return f(x, t), shaped as x. It can stand in for any estimate of x_0."""
        c_skip, c_out = consistency_scalings(timesteps + 1, x)
        return c_skip * x + c_out * self.estimate(x, timesteps, conditioning, step_counts)


@dataclass(frozen=True)
class LCM:
    """Latent consistency distillation with a teacher, a student and the student's average as target."""

    teacher: Guided
    student: ConsistencyFunction
    target: ConsistencyFunction
    coordinates: Coordinates

    def loss(self, batch: Batch) -> Tensor:
        """Return the loss, Eq. (10), between diffused data x_t and the teacher's guided DDIM step from there."""
        assert batch.latents is not None, "the distiller refuses a source without latents"
        skip = (self.coordinates.schedule.max_timestep + 1) // GRID
        high = ((batch.generator.tau + skip) // skip * skip - 1).clamp_max(self.coordinates.schedule.max_timestep)
        low = (high - skip).clamp_min(self.coordinates.clean_end)
        alphas, sigmas = self.coordinates.levels(high, batch.latents)
        x_high = alphas * batch.latents + sigmas * batch.generator.noise
        with torch.no_grad():
            x_low = self._teacher_step(x_high, high, low, batch.conditioning)
            target = self.target(x_low, low, batch.conditioning, None)
        return consistency_loss(self.student(x_high, high, batch.conditioning, None), target)

    def _teacher_step(self, x: Tensor, high: Tensor, low: Tensor, conditioning: Conditioning) -> Tensor:
        """Take a DDIM step from `high` to `low`."""
        x_0 = self.teacher(x, high, conditioning)
        (alpha_high, sigma_high), (alpha_low, sigma_low) = (self.coordinates.levels(t, x) for t in (high, low))
        return alpha_low * x_0 + sigma_low / sigma_high * (x - alpha_high * x_0)


def averaged(student: CleanEstimator, average: torch.nn.Module) -> CleanEstimator:
    """Return the student's estimate with averaged weights."""
    return replace(student, denoiser=average)
