"""Embedding of K, the number of steps that a denoiser is sampled with (TDM, sec. 3.2).

K is embedded as stock Stable Diffusion pipelines embed guidance_scale - 1. So a checkpoint with this
condition also runs there, with guidance_scale = K + 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def embed_step_count(steps: Tensor, dim: int) -> Tensor:
    """Return the embedding of step counts.

    Args:
        steps: [B], whole numbers >= 1.
        dim: even, the denoiser's `time_cond_proj_dim`.

    Returns:
        float32 [B, dim], sines then cosines, in [-1, 1].
    """
    half = dim // 2
    frequencies = torch.exp(
        torch.arange(half, dtype=torch.float32, device=steps.device) * (-math.log(10000.0) / (half - 1))
    )
    angles = 1000.0 * steps.to(torch.float32)[:, None] * frequencies[None, :]
    return torch.cat([angles.sin(), angles.cos()], dim=1)
