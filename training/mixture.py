"""A case with a known answer: a Gaussian mixture in the plane, whose scores are exact at every timestep.

The teacher is the mixture's posterior mean E[x_0 | x_t], in the coordinates of a diffusion model or of a flow.
Student and fake score are the same plus a small network that starts at zero. So the distance that remains after
distillation comes from the method and not from the teacher. Latents are [B, 2, 1, 1]; there are no prompts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tdm_runtime.families.conditioning import Conditioning
from tdm_runtime.families.step_condition import embed_step_count
from tdm_runtime.sampling.schedule import DiffusionSchedule, FlowSchedule
from training.config import DistillConfig
from training.methods.roles import SeparateRoles
from training.methods.trajectory import Coordinates, places_at, roll_out
from training.pretrained.presets import as_dmd2
from training.run.distill import Distiller, Run
from training.run.loop import step_generator

DIFFUSION = Coordinates(DiffusionSchedule(beta_schedule="squaredcos_cap_v2"), "sample")
FLOW = Coordinates(FlowSchedule(shift=3.0), "flow_prediction")
"""Coordinates of SD3, Z-Image and Wan: a velocity, and timesteps shifted by 3."""
CONDITION_DIM = 32
HIDDEN = 128
PROJECTIONS = 64
SAMPLES = 8192
"""Samples of each set when a distance is measured."""


@dataclass(frozen=True)
class Mixture:
    """Mixture of N Gaussians in the plane: weights [N], means [N, 2] and one standard deviation."""

    weights: Tensor
    means: Tensor
    std: float

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw `count` samples, [B, 2, 1, 1]."""
        component = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        x = self.means[component] + self.std * torch.randn(count, 2, generator=generator)
        return x.view(count, 2, 1, 1)

    def nearest(self, x: Tensor) -> Tensor:
        """Return the index of the nearest component of each sample, [B]."""
        return torch.cdist(x.flatten(1), self.means).argmin(1)

    def posterior_mean(self, x: Tensor, alphas: Tensor, sigmas: Tensor) -> Tensor:
        """Return E[x_0 | x_t = x], [B, 2]. x is [B, 2]; alphas and sigmas are [B, 1]."""
        variance = (alphas * self.std) ** 2 + sigmas**2
        offset = x[:, None, :] - alphas[:, None] * self.means
        log_share = self.weights.log() - offset.square().sum(2) / (2 * variance)
        gain = (alphas * self.std**2 / variance)[:, None]
        return (log_share.softmax(1)[:, :, None] * (self.means + gain * offset)).sum(1)


def ring(components: int = 6, radius: float = 1.3, std: float = 0.12) -> Mixture:
    """Return a mixture on a circle. Its first component weighs three times the last: unequal modes are easy to lose."""
    angles = torch.arange(components) * (2 * math.pi / components)
    weights = torch.linspace(3.0, 1.0, components)
    means = radius * torch.stack([angles.cos(), angles.sin()], 1)
    return Mixture(weights / weights.sum(), means, std)


class MixtureDenoiser(nn.Module):
    """The exact output plus a correction that starts at zero. K enters as in the real models."""

    def __init__(self, mixture: Mixture, coordinates: Coordinates = DIFFUSION) -> None:
        super().__init__()
        self.mixture, self.coordinates = mixture, coordinates
        self.first = nn.Linear(2 + 2 * 8, HIDDEN)
        self.cond_proj = nn.Linear(CONDITION_DIM, HIDDEN, bias=False)
        self.rest = nn.Sequential(nn.SiLU(), nn.Linear(HIDDEN, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, HIDDEN), nn.SiLU())
        self.last = nn.Linear(HIDDEN, 2)
        for layer in (self.cond_proj, self.last):
            nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, latents: Tensor, timesteps: Tensor, step_counts: Tensor | None, *_: Tensor | None) -> Tensor:
        """Return the estimate of x_0, or a flow's velocity noise - x_0, [B, 2, 1, 1]."""
        x = latents.flatten(1)
        alphas, sigmas = (level.flatten(1) for level in self.coordinates.levels(timesteps, latents))
        exact = self.mixture.posterior_mean(x, alphas, sigmas).view_as(latents)
        angles = (timesteps / 1000.0)[:, None] * (math.pi * 2.0 ** torch.arange(8))
        hidden = self.first(torch.cat([x, angles.sin(), angles.cos()], 1))
        if step_counts is not None:
            hidden = hidden + self.cond_proj(embed_step_count(step_counts, CONDITION_DIM))
        correction: Tensor = self.last(self.rest(hidden))
        return self.coordinates.to_output(latents, exact, timesteps) + correction.view_as(latents)


class NoPrompts:
    """Source of empty prompts, and of samples of the mixture as real latents."""

    def __init__(self, mixture: Mixture) -> None:
        self.mixture = mixture

    def conditioning(self, numbers: range) -> Conditioning:
        return Conditioning(torch.zeros(len(numbers), 1, 1))

    def empty(self) -> Conditioning:
        return Conditioning(torch.zeros(1, 1, 1))

    def latents(self, numbers: range) -> Tensor | None:
        return self.mixture.sample(len(numbers), torch.Generator().manual_seed(numbers.start))


DEFAULT = DistillConfig(
    steps=1500,
    batch_size=512,
    guidance_scale=1.0,
    student_learning_rate=1e-3,
    fake_learning_rate=2e-3,
    final_lr_share=0.02,
    warmup_steps=20,
    ema_decay=0.99,
    condition_lr_scale=1.0,
    precision="fp32",
)
"""Settings of TDM-unify on the mixture."""


def build_distiller(config: DistillConfig, coordinates: Coordinates = DIFFUSION) -> Distiller:
    """Return a distillation of the mixture, before its first iteration."""
    torch.manual_seed(config.seed)
    mixture = ring()
    roles = SeparateRoles(MixtureDenoiser(mixture, coordinates), coordinates, precision=config.precision)
    return Distiller(Run(roles, coordinates, NoPrompts(mixture), (2, 1, 1), config))


def sliced_wasserstein(first: Tensor, second: Tensor) -> float:
    """Return the sliced 2-Wasserstein distance of two sets [B, 2, 1, 1], in the data's units."""
    angles = torch.arange(PROJECTIONS) * (math.pi / PROJECTIONS)
    directions = torch.stack([angles.cos(), angles.sin()])
    a, b = ((x.flatten(1) @ directions).sort(0).values for x in (first, second))
    return float((a - b).square().mean().sqrt())


@dataclass(frozen=True)
class Distances:
    """Distances between a K-step student and the truth."""

    data: float
    """Sliced Wasserstein distance of the student's samples to the data."""
    trajectory: float
    """Distance of x_{t_i} to diffused data, averaged over the inner timesteps t_i; 0 for K = 1."""
    modes: float
    """Total variation between the student's shares of the components and the mixture's weights, 0..1."""


@torch.no_grad()
def measure(distiller: Distiller, step_count: int, seed: int = 10_000) -> Distances:
    """Compare a student of K steps with the truth."""
    generator = torch.Generator().manual_seed(seed)
    denoiser = distiller.roles.teacher.denoiser
    assert isinstance(denoiser, MixtureDenoiser)
    mixture, conditioning = denoiser.mixture, Conditioning(torch.zeros(SAMPLES, 1, 1))
    noise, data = torch.randn(SAMPLES, 2, 1, 1, generator=generator), mixture.sample(SAMPLES, generator)
    renoise = torch.randn(SAMPLES, step_count, 2, 1, 1, generator=generator)
    final = distiller.sample(noise, step_count, conditioning, renoise if distiller.config.samples_with_noise else None)
    inner = []
    for row in range(1, step_count):
        places = places_at(distiller.trajectories, torch.full((SAMPLES,), step_count), torch.full((SAMPLES,), row))
        with distiller.averaged_student() as student:
            x = roll_out(
                student,
                distiller.trajectories,
                noise,
                places,
                conditioning,
                with_k=distiller.config.student_receives_k,
            ).x
        alphas, sigmas = distiller.run.coordinates.levels(places.timestep, data)
        inner.append(sliced_wasserstein(x, alphas * data + sigmas * torch.randn(data.shape, generator=generator)))
    shares = mixture.nearest(final).bincount(minlength=len(mixture.weights)) / SAMPLES
    modes = 0.5 * float((shares - mixture.weights).abs().sum())
    return Distances(sliced_wasserstein(final, data), sum(inner) / max(1, len(inner)), modes)


def prove(config: DistillConfig = DEFAULT, coordinates: Coordinates = DIFFUSION) -> dict[int, Distances]:
    """Distil the mixture, and return the distances of every K."""
    distiller = build_distiller(config, coordinates)
    for step in range(config.steps):
        distiller.train_step(step, step_generator(config.seed, "mixture", step))
    return {k: measure(distiller, k) for k in config.step_counts}


VARIANTS: Mapping[str, DistillConfig] = {
    "TDM-unify": DEFAULT,
    "one fake score for every K (Eq. 9)": replace(DEFAULT, step_condition_for="student"),
    "without K": replace(DEFAULT, step_condition_for="none"),
    "no importance sampling": replace(DEFAULT, fake_target="clean"),
    "exact importance weights": replace(DEFAULT, fake_target="importance_exact"),
    "weight 1": replace(DEFAULT, fake_target="unweighted"),
    "trajectory score": replace(DEFAULT, fake_target="trajectory_score"),
    "reverse intervals": replace(DEFAULT, interval="reverse"),
    "plain L2, DMD normalisation": replace(DEFAULT, generator_loss="normalised_l2"),
    "matching clean samples": replace(DEFAULT, matching="clean"),
    "Fisher divergence": replace(DEFAULT, generator_loss="fisher", student_learning_rate=2e-4, fake_updates=2),
    "DMD2": replace(as_dmd2(DEFAULT), fake_updates=5),
}
"""The method, and variants of it."""
