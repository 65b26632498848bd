"""The random numbers of an iteration, drawn for the whole batch at once.

Each process and each accumulated part takes its slice. So any number of processes and parts trains on
the same numbers, and an iteration is a function of (seed, step) alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tdm_runtime.families.conditioning import Conditioning
from training.config import DistillConfig
from training.methods.trajectory import Coordinates, Places, Trajectories, draw_places

FULL_RANGE = (0.02, 0.98)
"""Range in which DMD draws tau, as shares of T (Yin et al. 2024)."""


@dataclass(frozen=True)
class Forward:
    """A draw of the forward process: timestep and noise."""

    tau: Tensor
    """Timesteps, [B]."""
    noise: Tensor
    """Noise, shaped as latents."""

    def part(self, part: slice, device: torch.device) -> Forward:
        return Forward(self.tau[part], self.noise[part].to(device))


@dataclass(frozen=True)
class Draws:
    """The random numbers of an iteration."""

    places: Places
    noise: Tensor
    fake: tuple[Forward, ...]
    """One draw for each update of the fake score."""
    generator: Forward
    renoise: Tensor | None
    """Fresh noise of stochastic rollouts, [B, rows, ...]."""


@dataclass(frozen=True)
class Batch:
    """A part of an iteration's draws with its prompts, on the device that trains it."""

    places: Places
    noise: Tensor
    fake: tuple[Forward, ...]
    generator: Forward
    renoise: Tensor | None
    conditioning: Conditioning
    latents: Tensor | None
    """Real latents of the same prompts, for methods that learn from data."""


class PromptSource(Protocol):
    """An endless, numbered list of encoded prompts, the only input that the method needs."""

    def conditioning(self, numbers: range) -> Conditioning:
        """Return the prompts of these numbers. A prompt is a function of its number, so that a run resumes exactly."""
        ...

    def empty(self) -> Conditioning:
        """Return the empty prompt, batch 1."""
        ...

    def latents(self, numbers: range) -> Tensor | None:
        """Return real latents of the same prompts, of unit spread, or None if the source has no data."""
        ...


def draw(
    config: DistillConfig, trajectories: Trajectories, latent_shape: tuple[int, ...], generator: torch.Generator
) -> Draws:
    """Draw the random numbers of an iteration for the whole batch."""
    places = draw_places(trajectories, config.batch_size, generator)
    shape = (config.batch_size, *latent_shape)

    def forward() -> Forward:
        tau = draw_tau(config, trajectories.coordinates, places, generator)
        return Forward(tau, torch.randn(shape, generator=generator))

    noise = torch.randn(shape, generator=generator)
    renoise = None
    if config.rollout == "stochastic":
        rows = max(trajectories.step_counts)
        renoise = torch.randn(config.batch_size, rows, *latent_shape, generator=generator)
    return Draws(places, noise, tuple(forward() for _ in range(config.fake_updates)), forward(), renoise)


def draw_tau(config: DistillConfig, coordinates: Coordinates, places: Places, generator: torch.Generator) -> Tensor:
    """Draw tau of each sample, [B], uniform in the interval that the config names.

    TDM that matches noisy samples diffuses them from t_m on, so no interval begins below t_m.
    """
    last = torch.full_like(places.timestep, coordinates.schedule.max_timestep)
    if config.interval == "full":
        low, high = (last * FULL_RANGE[0]).ceil(), (last * FULL_RANGE[1]).floor()
        if config.method == "tdm" and config.matching == "noisy":
            low = torch.maximum(low, places.next_timestep)
            high = torch.maximum(high, low + 1)
        return coordinates.draw_between(low, high, generator)
    high = places.timestep if config.interval == "disjoint" else last
    low = torch.minimum(places.next_timestep + config.min_tau_gap, high - 1)
    return coordinates.draw_between(low, high, generator)


def part_of(
    draws: Draws, part: slice, prompts: PromptSource, first_number: int, device: torch.device, *, has_latents: bool
) -> Batch:
    """Return a slice of an iteration on a device. Latents are read only if `has_latents`."""
    numbers = range(first_number + part.start, first_number + part.stop)
    latents = prompts.latents(numbers) if has_latents else None
    return Batch(
        draws.places[part],
        draws.noise[part].to(device),
        tuple(forward.part(part, device) for forward in draws.fake),
        draws.generator.part(part, device),
        None if draws.renoise is None else draws.renoise[part].to(device),
        prompts.conditioning(numbers).to(device),
        None if latents is None else latents.to(device),
    )
