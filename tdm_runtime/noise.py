"""Noise belongs to the request: a function of its seed alone, equal in any company."""

from __future__ import annotations

import torch
from torch import Tensor


def initial_noise(seed: int, shape: tuple[int, ...]) -> Tensor:
    """Return unit normal noise, float32 on the CPU, the same bits for the same seed and shape."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32)
