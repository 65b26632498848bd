"""Tiny denoisers and inputs for them, for the tests of backends."""

from __future__ import annotations

import torch
from torch import Tensor

from tdm_runtime.backends.interface import Interface
from tdm_runtime.families import Denoiser, denoiser_for
from tests.tiny_models import TEXT_TOKENS, TINY_MODELS, TINY_SHAPES, tiny_conditioning

CONDITION_DIM = 8


def tiny_denoiser(family: str, seed: int = 0) -> tuple[Denoiser, Interface]:
    """Return a step-conditioned denoiser, float32 on the CPU, and its interface. The seed sets the weights."""
    denoiser = denoiser_for(TINY_MODELS[family]())
    denoiser.add_step_condition(CONDITION_DIM)
    draw = torch.Generator().manual_seed(seed)
    for parameter in denoiser.parameters():
        if seed or not parameter.any():  # the step condition starts at zero; it must have an effect
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5, generator=draw)
    return denoiser.requires_grad_(False), denoiser.interface(TEXT_TOKENS)


def tiny_inputs(family: str, batch: int, *, seed: int = 0, scale: int = 1) -> tuple[Tensor, ...]:
    """Return random inputs of the interface, on the CPU.

    Args:
        scale: factor of latent height and width.
    """
    draw = torch.Generator().manual_seed(seed)
    *front, height, width = TINY_SHAPES[family]
    latents = torch.randn(batch, *front, height * scale, width * scale, generator=draw)
    timesteps = torch.linspace(999, 20, batch)
    step_counts = torch.arange(batch) % 4 + 1
    conditioning = [t for t in tiny_conditioning(family, batch, seed).tensors() if t is not None]
    return latents, timesteps, step_counts, *conditioning


def relative_l2(actual: Tensor, expected: Tensor) -> float:
    """Return |actual - expected| / |expected|, computed on the CPU in float64."""
    actual, expected = actual.cpu().double(), expected.cpu().double()
    return float((actual - expected).norm() / expected.norm())
