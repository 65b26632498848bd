"""A case with a known answer: where each target of the fake score leaves an inner step of a linear student.

The data is N(0, 0.6^2) in each of d dimensions. The student's first of two steps turns the noise into x_m = c noise,
which is right if c^2 is the variance of the data diffused to t_m. The fake score estimates gain_tau x, with the best
gain for its loss. The student rests where the gradient of its loss is 0. Losses and updates are those of `TDM`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import Tensor, nn

from tdm_runtime.families.conditioning import Conditioning
from tdm_runtime.sampling.schedule import DiffusionSchedule
from training.config import DistillConfig, FakeTarget
from training.methods.batch import Batch, Forward
from training.methods.roles import Guided, SeparateRoles
from training.methods.tdm import TDM, StudentSample
from training.methods.trajectory import Coordinates, places_at
from training.run.distill import trajectories_of

STD = 0.6
"""Standard deviation of the data."""
DIFFUSION = Coordinates(DiffusionSchedule(), "sample")
TAUS = 20
"""Timesteps tau, evenly spaced over the step's interval."""
ELEMENTS = 20_000
"""Random numbers for each tau by default: samples times dimensions."""
BISECTIONS = 13
TARGETS = get_args(FakeTarget)


class Gains(nn.Module):
    """Estimate gain_tau x, with a gain for each place of tau in the batch."""

    def __init__(self, coordinates: Coordinates) -> None:
        super().__init__()
        self.coordinates = coordinates
        self.gains = nn.Parameter(torch.zeros(TAUS, 1, 1, 1, 1))

    def forward(self, x: Tensor, timesteps: Tensor, *_: object) -> Tensor:
        estimate = (self.gains * x.view(TAUS, -1, *x.shape[1:])).view_as(x)
        return self.coordinates.to_output(x, estimate, timesteps)


class PosteriorMean(nn.Module):
    """E[x_0 | x_t] of the data."""

    def __init__(self, coordinates: Coordinates) -> None:
        super().__init__()
        self.coordinates = coordinates

    def forward(self, x: Tensor, timesteps: Tensor, *_: object) -> Tensor:
        alphas, sigmas = self.coordinates.levels(timesteps, x)
        estimate = alphas * STD**2 / (alphas**2 * STD**2 + sigmas**2) * x
        return self.coordinates.to_output(x, estimate, timesteps)


@dataclass(frozen=True)
class InnerStep:
    """The first of two steps of a student, before its update."""

    method: TDM
    batch: Batch

    @property
    def true_variance(self) -> float:
        """Variance of the data diffused to t_m."""
        alpha, sigma = self._levels_at(self.batch.places.next_timestep)
        return alpha**2 * STD**2 + sigma**2

    def resting_variance(self) -> float:
        """Return the variance of x_m at which the student's gradient is 0, by bisection; NaN if none is."""
        low, high = 0.8 * self.true_variance, 4.0
        if not self.gradient(low) < 0 < self.gradient(high):
            return float("nan")
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            low, high = (middle, high) if self.gradient(middle) < 0 else (low, middle)
        return (low + high) / 2

    def gradient(self, variance: float) -> float:
        """Return d loss / d c of the student at c = sqrt(variance), beside its best fake score."""
        c = torch.tensor(variance**0.5, requires_grad=True)
        (alpha, sigma), places = self._levels_at(self.batch.places.timestep), self.batch.places
        alpha_m, sigma_m = self._levels_at(places.next_timestep)
        # x_m = alpha_m x_0 + sigma_m (noise - alpha x_0) / sigma = c noise
        x_0 = (c - sigma_m / sigma) / (alpha_m - sigma_m * alpha / sigma) * self.batch.noise
        sample = StudentSample(c * self.batch.noise, x_0, places.next_timestep)
        self._learn_fake_score(sample)
        loss, _ = self.method.generator_loss(self.batch, sample, self.batch.generator)
        (gradient,) = torch.autograd.grad(loss, c)
        return float(gradient)

    def _learn_fake_score(self, sample: StudentSample) -> None:
        """Give each tau the gain of its least loss. The loss is quadratic, so two gradients give it."""
        gains = self.method.roles.fake.denoiser.gains
        assert isinstance(gains, nn.Parameter)
        gradients: list[Tensor] = []
        for value in (0.0, 1.0):
            nn.init.constant_(gains, value)
            loss = self.method.fake_loss(self.batch, sample, self.batch.generator)
            gradients += torch.autograd.grad(loss, gains)
        with torch.no_grad():
            gains.copy_(gradients[0] / (gradients[0] - gradients[1]))

    def _levels_at(self, timesteps: Tensor) -> tuple[float, float]:
        alphas, sigmas = self.method.trajectories.coordinates.levels(timesteps[:1], self.batch.noise[:1])
        return float(alphas), float(sigmas)


def inner_step(
    target: FakeTarget, dimensions: int, seed: int, coordinates: Coordinates = DIFFUSION, elements: int = ELEMENTS
) -> InnerStep:
    """Return an inner step with its random numbers.

    Args:
        dimensions: elements d of a sample.
        elements: random numbers for each tau.
    """
    config = DistillConfig(precision="fp32", guidance_scale=1.0, step_counts=(2,), fake_target=target)
    teacher = PosteriorMean(coordinates)
    roles = SeparateRoles(teacher, coordinates, precision="fp32")
    roles.fake = replace(roles.fake, denoiser=Gains(coordinates))
    empty = Conditioning(torch.zeros(1, 1, 1))
    method = TDM(roles, trajectories_of(config, coordinates), config, Guided(roles.teacher, empty, 1.0))
    each = elements // dimensions
    count, generator = TAUS * each, torch.Generator().manual_seed(seed)
    places = places_at(method.trajectories, torch.tensor([2]), torch.tensor([0]))[torch.zeros(count, dtype=torch.long)]
    share = ((torch.arange(TAUS, dtype=torch.float64) + 1) / TAUS).repeat_interleave(each)
    tau = (places.next_timestep + share * (places.timestep - places.next_timestep)).round()
    noise, forward_noise = (torch.randn(count, 1, 1, dimensions, generator=generator) for _ in range(2))
    prompts = Conditioning(torch.zeros(count, 1, 1))
    return InnerStep(method, Batch(places, noise, (), Forward(tau, forward_noise), None, prompts, None))
