"""Initial noise of a request: a function of its seed, the same alone and in a batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def initial_noise(seed: int, shape: tuple[int, ...], angle: float = 0.0) -> Tensor:
    """Return unit normal noise, float32 on the CPU, the same bits for the same seed, shape and angle.

    A seed has a circle of noises, cos(angle) first + sin(angle) second; its generator draws first, then second. Both
    are independent and unit normal, and cos^2 + sin^2 = 1, so the noise at every angle is unit normal too.

    Args:
        angle: In radians; 0 gives the first noise.
    """
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(shape, generator=generator, dtype=torch.float32)
    if angle == 0.0:
        return first
    second = torch.randn(shape, generator=generator, dtype=torch.float32)
    return math.cos(angle) * first + math.sin(angle) * second
