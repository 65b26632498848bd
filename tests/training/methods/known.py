"""A network with a known output and a batch for it, so that tests compute losses by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from tdm_runtime.families.conditioning import Conditioning
from tdm_runtime.sampling.schedule import DiffusionSchedule
from training.config import DistillConfig
from training.methods.batch import Batch, Forward
from training.methods.roles import Guided, SeparateRoles
from training.methods.tdm import TDM
from training.methods.trajectory import Coordinates, places_at
from training.run.distill import trajectories_of

COORDINATES = Coordinates(DiffusionSchedule(), "sample")
"""Coordinates in which the output of a network is its estimate of x_0."""
SHAPE = (2, 3, 2)
"""Shape of a sample."""
EMPTY = Conditioning(torch.full((1, 1, 1), -0.6))
TEACHER, STUDENT, FAKE = 0.9, 0.5, 0.7
"""Gains of the three networks."""
CONFIG = DistillConfig(precision="fp32", guidance_scale=2.5)


def known(gain: float | Tensor, x: Tensor, timesteps: Tensor, prompts: Conditioning, k: Tensor | None = None) -> Tensor:
    """Return gain x + t / 1000 + prompt + K / 10, [B, ...]."""
    rest = timesteps.float() / 1000 + prompts.prompt_embeds.flatten()
    return gain * x + column(rest if k is None else rest + k / 10)


class KnownDenoiser(nn.Module):
    """Network with the output of `known`, which depends on every argument that the network receives."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))

    def forward(self, x: Tensor, timesteps: Tensor, k: Tensor | None, prompt_embeds: Tensor, *_: None) -> Tensor:
        return known(self.gain, x, timesteps, Conditioning(prompt_embeds), k)


def column(values: Tensor) -> Tensor:
    """Reshape [B] to [B, 1, 1, 1]."""
    return values.view(-1, 1, 1, 1)


def levels(timesteps: Tensor, schedule: DiffusionSchedule = COORDINATES.schedule) -> tuple[Tensor, Tensor]:  # type: ignore[assignment]
    """Return alpha and sigma at whole timesteps [B], [B, 1, 1, 1]; timestep -1 is the clean end."""
    products = np.append(schedule.alphas_cumprod, 1.0)[timesteps.long().numpy()]
    return column(torch.from_numpy(products**0.5).float()), column(torch.from_numpy((1 - products) ** 0.5).float())


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def method_of(config: DistillConfig) -> TDM:
    """Return the method with three networks of known output."""
    roles = SeparateRoles(KnownDenoiser(TEACHER), COORDINATES, student=KnownDenoiser(STUDENT), precision="fp32")
    nn.init.constant_(roles.module("fake").gain, FAKE)  # type: ignore[arg-type]
    guided = Guided(roles.teacher, EMPTY, config.guidance_scale)
    return TDM(roles, trajectories_of(config, COORDINATES), config, guided)


def batch_of(method: TDM) -> Batch:
    """Return four samples at different K and steps, each with a prompt, real latents and a tau of its own."""
    k, row = torch.tensor([4, 4, 2, 1]), torch.tensor([3, 1, 1, 0])
    places, shape = places_at(method.trajectories, k, row), (4, *SHAPE)
    share = torch.tensor([0.1, 0.4, 0.6, 0.9], dtype=torch.float64)
    tau = (places.next_timestep + share * (places.timestep - places.next_timestep)).round()
    prompts = Conditioning(torch.tensor([0.3, -0.2, 0.5, 0.1]).view(4, 1, 1))
    forward, other = Forward(tau, normal(*shape, seed=0)), Forward(tau - 9, normal(*shape, seed=1))
    return Batch(places, normal(*shape, seed=2), (other,), forward, None, prompts, normal(*shape, seed=3))


def with_renoise(batch: Batch) -> Batch:
    return replace(batch, renoise=normal(4, 4, *SHAPE, seed=4))
