"""Positional embeddings in tensors only, so that torch.export keeps them dependent on the sizes of the inputs."""

from __future__ import annotations

from typing import Any

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


def rotary_embedding(self: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """FluxPosEmbed.forward and Flux2PosEmbed.forward without float64, which TensorRT has not.

    Args:
        self: the module, with the width of each axis in `axes_dim` and the base of the frequencies in `theta`.
        ids: position of each token along each axis, [N, axes].

    Returns:
        Cosines and sines, [N, sum of axes_dim] each. Neighbours of a pair are equal.
    """
    angles = []
    for axis, dim in enumerate(self.axes_dim):
        frequencies = [1.0 / self.theta ** (n / dim) for n in range(0, dim, 2)]
        angles.append(ids[:, axis, None].float() * torch.tensor(frequencies, dtype=torch.float32, device=ids.device))
    joined = torch.cat(angles, dim=1).repeat_interleave(2, dim=1)
    return joined.cos(), joined.sin()
