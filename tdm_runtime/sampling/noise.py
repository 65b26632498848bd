"""Noise belongs to the request: a function of its seed alone, equal in any company."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def initial_noise(seed: int, shape: tuple[int, ...], angle: float = 0.0) -> Tensor:
    """Return unit normal noise, float32 on the CPU, the same bits for the same seed, shape and angle.

    A seed has a circle of noises, cos(angle) first + sin(angle) second, where the second is what its generator draws
    next. Both are independent and of unit variance, and cos^2 + sin^2 = 1: so is the noise at every angle.

    Args:
        angle: in radians; 0 is the first noise itself.
    """
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(shape, generator=generator, dtype=torch.float32)
    if angle == 0.0:
        return first
    second = torch.randn(shape, generator=generator, dtype=torch.float32)
    return math.cos(angle) * first + math.sin(angle) * second
