"""Consistency distillation, two baselines: LCM (Luo et al. 2023), the start of Fig. 8, and TCD (Zheng et al. 2024).

LCM makes f(x, t) = c_skip(t) x + c_out(t) x_0(x, t) equal at both ends of a teacher's step, Eq. (10). Its sampler is
stochastic. TCD makes f(x, t, s), the DDIM step from t to s with x_0(x, t), equal there for every s, so that steps of
a deterministic sampler are right too. Both need real latents.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tdm_runtime.families.conditioning import Conditioning
from training.methods.batch import Batch
from training.methods.losses import consistency_loss, consistency_scalings, like_levels
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
class TeacherStep:
    """A teacher's guided DDIM step from diffused data."""

    x_high: Tensor
    high: Tensor
    """Timesteps where the step starts, [B]."""
    x_low: Tensor
    """Sample that the teacher's step reaches, without gradient."""
    low: Tensor
    """Timesteps where the step ends, [B]."""


def ddim_step(coordinates: Coordinates, x: Tensor, x_0: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Step from timesteps `start` to `end` [B] along the noise that x and x_0 imply. A step of no length returns x."""
    (alpha, sigma), (alpha_end, sigma_end) = (coordinates.levels(t, x) for t in (start, end))
    moved = alpha_end * x_0 + sigma_end / sigma * (x - alpha * x_0)
    return torch.where(like_levels((start == end).to(x.device), x), x, moved)


def teacher_step(teacher: Guided, coordinates: Coordinates, batch: Batch) -> TeacherStep:
    """Diffuse the batch's latents to the grid's timestep at or above tau, and take the teacher's step from there."""
    assert batch.latents is not None, "the distiller refuses a source without latents"
    skip = (coordinates.schedule.max_timestep + 1) // GRID
    high = ((batch.generator.tau + skip) // skip * skip - 1).clamp_max(coordinates.schedule.max_timestep)
    low = (high - skip).clamp_min(coordinates.clean_end)
    alphas, sigmas = coordinates.levels(high, batch.latents)
    x_high = alphas * batch.latents + sigmas * batch.generator.noise
    with torch.no_grad():
        x_low = ddim_step(coordinates, x_high, teacher(x_high, high, batch.conditioning), high, low)
    return TeacherStep(x_high, high, x_low, low)


@dataclass(frozen=True)
class LCM:
    """Latent consistency distillation. The target is the student's average, or the student itself for LoRA."""

    teacher: Guided
    student: ConsistencyFunction
    target: ConsistencyFunction
    coordinates: Coordinates

    def loss(self, batch: Batch) -> Tensor:
        """Return the loss, Eq. (10), between diffused data x_t and the teacher's guided DDIM step from there."""
        step = teacher_step(self.teacher, self.coordinates, batch)
        with torch.no_grad():
            target = self.target(step.x_low, step.low, batch.conditioning, None)
        return consistency_loss(self.student(step.x_high, step.high, batch.conditioning, None), target)


@dataclass(frozen=True)
class TCD:
    """Trajectory consistency distillation with first-order steps. The target is chosen as in `LCM`."""

    teacher: Guided
    student: CleanEstimator
    target: CleanEstimator
    coordinates: Coordinates

    def loss(self, batch: Batch) -> Tensor:
        """Return the loss between f(x, t, s) at both ends of the teacher's step (Zheng et al. 2024, algorithm 1).

        s is uniform between the clean end and the lower end. Its random number is the tau of the fake score, which the
        method does not use otherwise.
        """
        step, clean_end = teacher_step(self.teacher, self.coordinates, batch), self.coordinates.clean_end
        share = batch.fake[0].tau / self.coordinates.schedule.max_timestep
        end = clean_end + (share * (step.low - clean_end)).round()
        with torch.no_grad():
            target = self._step(self.target, step.x_low, step.low, end, batch)
        return consistency_loss(self._step(self.student, step.x_high, step.high, end, batch), target)

    def _step(self, estimate: CleanEstimator, x: Tensor, start: Tensor, end: Tensor, batch: Batch) -> Tensor:
        return ddim_step(self.coordinates, x, estimate(x, start, batch.conditioning, None), start, end)


def averaged(student: CleanEstimator, average: torch.nn.Module) -> CleanEstimator:
    """Return the student's estimate with averaged weights."""
    return replace(student, denoiser=average)
