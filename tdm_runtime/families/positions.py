"""Positional embeddings in tensors only, so that torch.export keeps them dependent on the sizes of the inputs."""

from __future__ import annotations

import torch
from torch import Tensor


def length(counted: Tensor) -> Tensor:
    """Return n as a tensor for counted = 0 ... n - 1; torch.export would trace a size as a Python number."""
    return counted[-1] + 1


def sines_1d(positions: Tensor, dim: int) -> Tensor:
    """Return [N, dim]: sines, then cosines."""
    omega = torch.arange(dim // 2, dtype=torch.float64) / (dim / 2)
    angles = positions[:, None] * (1.0 / 10000**omega).float()
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sines_2d(rows: Tensor, columns: Tensor, dim: int) -> Tensor:
    """Return [H * W, dim]: one half for the columns, then one half for the rows, in diffusers' order."""
    across = sines_1d(columns, dim // 2)[None].expand(rows.shape[0], -1, -1)
    down = sines_1d(rows, dim // 2)[:, None].expand(-1, columns.shape[0], -1)
    return torch.cat([across, down], dim=-1).flatten(0, 1)
