"""A flow transformer from nothing: a tiny SD3 learns pictures of one colour, and TDM-unify distils it.

A picture has 4x4 pixels of one colour, a point of the mixture's ring. The prompt names a palette, the first or the last
three of the six components. So the true distribution is known, and distances are those of the mixture.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

from tdm_runtime.families import denoiser_for
from tdm_runtime.families.conditioning import Conditioning
from tdm_runtime.families.denoiser import Denoiser
from training.config import DistillConfig
from training.methods.denoising import finetuning_loss
from training.methods.roles import CleanEstimator, SeparateRoles
from training.methods.trajectory import build_trajectories, sample
from training.mixture import FLOW, Mixture, ring, sliced_wasserstein
from training.run.distill import Distiller, Run
from training.run.loop import descend, learning_rate_at, set_learning_rate, step_generator, update_ema

SIDE = 4
"""Pixels along each side; a token has 2x2."""
PALETTES = 2
TEXT_DIM = 16
MANY_STEPS = 16
SAMPLES = 1024
"""Samples of a palette when a distance is measured."""


def palette(number: int) -> Mixture:
    """Return the colours of a palette."""
    whole = ring()
    part = slice(3 * number, 3 * number + 3)
    return Mixture(whole.weights[part] / whole.weights[part].sum(), whole.means[part], whole.std)


class PalettePrompts:
    """Endless prompts that name the palettes in turn, with pictures of their colours."""

    def __init__(self) -> None:
        self._embeds = torch.randn(PALETTES, 1, TEXT_DIM, generator=torch.Generator().manual_seed(0))

    def conditioning(self, numbers: range) -> Conditioning:
        embeds = self._embeds[torch.tensor(numbers) % PALETTES]
        return Conditioning(embeds, embeds[:, 0])

    def empty(self) -> Conditioning:
        return Conditioning(torch.zeros(1, 1, TEXT_DIM), torch.zeros(1, TEXT_DIM))

    def latents(self, numbers: range) -> Tensor | None:
        generator = torch.Generator().manual_seed(numbers.start)
        each = torch.stack([palette(n).sample(len(numbers), generator) for n in range(PALETTES)])
        colours = each[torch.tensor(numbers) % PALETTES, torch.arange(len(numbers))]
        return colours.expand(-1, -1, SIDE, SIDE).contiguous()


@dataclass(frozen=True)
class TeacherConfig:
    """Settings of the teacher's training."""

    steps: int = 300
    batch_size: int = 128
    learning_rate: float = 2e-3
    ema_decay: float = 0.98
    seed: int = 0


STUDENT = DistillConfig(
    steps=100,
    batch_size=64,
    guidance_scale=1.0,
    student_learning_rate=2e-4,
    fake_learning_rate=2e-3,
    final_lr_share=0.02,
    warmup_steps=10,
    ema_decay=0.97,
    condition_lr_scale=1.0,
    precision="fp32",
)
"""Settings of TDM-unify on the pictures."""


def tiny_transformer() -> Denoiser:
    """Return a transformer of Stable Diffusion 3 with random weights."""
    return denoiser_for(
        SD3Transformer2DModel(
            sample_size=SIDE,
            patch_size=2,
            in_channels=2,
            out_channels=2,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=TEXT_DIM,
            caption_projection_dim=64,
            pooled_projection_dim=TEXT_DIM,
            pos_embed_max_size=SIDE // 2,
        )
    )


def train_teacher(config: TeacherConfig) -> Denoiser:
    """Train a transformer on the pictures by flow matching. Return the average of its weights."""
    torch.manual_seed(config.seed)
    model, prompts = tiny_transformer().train(), PalettePrompts()
    average = copy.deepcopy(model).eval().requires_grad_(False)
    estimator = CleanEstimator(model, FLOW, "fp32")
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    for step in range(config.steps):
        set_learning_rate(optimizer, learning_rate_at(step, config.steps, config.learning_rate, warmup=20))
        numbers = range(step * config.batch_size, (step + 1) * config.batch_size)
        latents = prompts.latents(numbers)
        assert latents is not None
        generator = step_generator(config.seed, "teacher", step)
        conditioning = prompts.conditioning(numbers)
        descend(optimizer, finetuning_loss(estimator, latents, conditioning, prompts.empty(), 0.0, generator))
        update_ema(average, model, step, config.ema_decay)
    return average


def distil(teacher: Denoiser, config: DistillConfig = STUDENT) -> Distiller:
    """Distil a teacher."""
    base = copy.deepcopy(teacher)
    base.add_step_condition()
    roles = SeparateRoles(base, FLOW, precision="fp32")
    distiller = Distiller(Run(roles, FLOW, PalettePrompts(), (2, SIDE, SIDE), config))
    for step in range(config.steps):
        distiller.train_step(step, step_generator(config.seed, "tdm", step))
    return distiller


Sampler = Callable[[Tensor, int, Conditioning], Tensor]
"""(noise, step count, prompts) -> pictures."""


@torch.no_grad()
def distance(sampler: Sampler, step_count: int, seed: int = 10_000) -> float:
    """Return the distance of pictures to the data, a mean over the palettes.

    A picture is its mean colour and what differs from it, which the data does not have. The squared distance is that
    of the mean colours (`sliced_wasserstein`) plus the mean square of the rest.
    """
    distances = []
    for number in range(PALETTES):
        generator = torch.Generator().manual_seed(seed + number)
        prompts = PalettePrompts().conditioning(range(number, PALETTES * SAMPLES, PALETTES))
        pictures = sampler(torch.randn(SAMPLES, 2, SIDE, SIDE, generator=generator), step_count, prompts)
        colours = pictures.mean((2, 3), keepdim=True)
        rest = (pictures - colours).square().sum(1).mean().item()
        distances.append(math.hypot(sliced_wasserstein(colours, palette(number).sample(SAMPLES, generator)), rest**0.5))
    return mean(distances)


def teacher_sampler(teacher: Denoiser) -> Sampler:
    """Return the teacher with Euler steps at the student's timesteps."""
    estimate = CleanEstimator(teacher, FLOW, "fp32")

    def sampled(noise: Tensor, step_count: int, conditioning: Conditioning) -> Tensor:
        trajectories = build_trajectories(FLOW, "ddim", {step_count: FLOW.even_timesteps(step_count)})
        return sample(estimate, trajectories, noise, step_count, conditioning, with_k=False)

    return sampled
