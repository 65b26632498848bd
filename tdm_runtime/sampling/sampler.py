"""One solver step for a batch whose rows come from different tables."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tdm_runtime.sampling.step_table import StepTable

StepRow = tuple[StepTable, int]
"""A table and the index of the step to take."""


def gather_rows(steps: Sequence[StepRow], device: torch.device) -> Tensor:
    """Return float32 [B, 6]: timestep, p, q, a, b, c of each sample's own step."""
    return torch.from_numpy(np.array([table.rows[step_index] for table, step_index in steps])).to(device)


def apply_step(rows: Tensor, latents: Tensor, model_output: Tensor, previous: Tensor | None) -> tuple[Tensor, Tensor]:
    """Take one step of every sample.

    Args:
        rows: [B, 6], from `gather_rows`.
        latents: [B, C, H, W], x_j.
        model_output: as latents.
        previous: as latents, denoised_{j-1}; anything finite where c is 0, None where it is 0 in every row.

    Returns:
        x_{j+1} and denoised_j.
    """
    _, p, q, a, b, c = rows.view(*rows.shape, 1, 1, 1).unbind(1)
    # Products and sums one by one: fused ones round by the place in the batch. In place: they are many and small.
    denoised = (p * latents).add_(q * model_output)
    following = (a * latents).add_(b * denoised)
    return following if previous is None else following.add_(c * previous), denoised
