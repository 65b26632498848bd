"""One solver step for a batch whose rows come from different tables."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tdm_runtime.step_table import StepTable

StepRow = tuple[StepTable, int]
"""A table and the index of the step to take."""


def gather_rows(steps: Sequence[StepRow], device: torch.device) -> Tensor:
    """Return float32 [B, 6]: timestep, p, q, a, b, c of each sample's own step."""
    rows = [(t.timesteps[j], t.p[j], t.q[j], t.a[j], t.b[j], t.c[j]) for t, j in steps]
    return torch.from_numpy(np.array(rows, dtype=np.float32)).to(device)


def apply_step(rows: Tensor, latents: Tensor, model_output: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
    """Take one step of every sample.

    Args:
        rows: [B, 6], from `gather_rows`.
        latents: [B, C, H, W], x_j.
        model_output: as latents.
        previous: as latents, denoised_{j-1}; anything finite where c is 0.

    Returns:
        x_{j+1} and denoised_j.
    """
    _, p, q, a, b, c = (column.view(-1, 1, 1, 1) for column in rows.unbind(1))
    denoised = p * latents + q * model_output
    return a * latents + b * denoised + c * previous, denoised
