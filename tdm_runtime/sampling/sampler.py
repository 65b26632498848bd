"""Solver steps of a batch: one step with rows of any tables, or all steps of one table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from tdm_runtime.sampling.known_picture import KnownPicture
from tdm_runtime.sampling.step_table import StepTable

StepRow = tuple[StepTable, int]
"""A table and the index of the step to take."""


def gather_rows(steps: Sequence[StepRow], device: torch.device) -> Tensor:
    """Return float32 [B, 8]: timestep, p, q, a, b, c, d, e of each sample's own step."""
    return torch.from_numpy(np.array([table.rows[step_index] for table, step_index in steps])).to(device)


def apply_step(
    rows: Tensor,
    latents: Tensor,
    model_output: Tensor,
    previous: Tensor | None,
    noise: Tensor | None = None,
    before: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Take one step of every sample.

    Args:
        rows: [B, 8], from `gather_rows`.
        latents: x_j, [B, C, H, W] or [B, C, F, H, W].
        model_output: Same shape as latents.
        previous: denoised_{j-1}, same shape as latents; anything finite where c is 0, None where c is 0 in every row.
        noise: noise_j, same shape as latents; anything finite where d is 0, None where d is 0 in every row.
        before: denoised_{j-2}, same shape as latents; anything finite where e is 0, None where e is 0 in every row.

    Returns:
        x_{j+1} and denoised_j.
    """
    _, p, q, a, b, c, d, e = rows.view(*rows.shape, *[1] * (latents.ndim - 1)).unbind(1)
    # Products and sums one by one: fused ones round by the place in the batch. In place: they are many and small.
    denoised = (p * latents).add_(q * model_output)
    following = (a * latents).add_(b * denoised)
    if previous is not None:
        following.add_(c * previous)
    if noise is not None:
        following.add_(d * noise)
    if before is not None:
        following.add_(e * before)
    return following, denoised


def solve(
    table: StepTable,
    noise: Tensor,
    predict: Callable[[Tensor, Tensor], Tensor],
    step_noise: Callable[[int], Tensor] | None = None,
    known: KnownPicture | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Take all steps of one table, for a batch that shares it.

    Args:
        noise: Unit normal, [B, C, H, W] or [B, C, F, H, W], on the device of the denoiser.
        predict: Called with latents and timesteps [B]; returns the model output.
        step_noise: Called with the index of a step that takes fresh noise; returns it, in a shape that broadcasts to
            that of `noise`, on any device. None where the table takes none.

    Yields:
        x_{j+1} and denoised_j after each step.

    Raises:
        ValueError: the table takes fresh noise and `step_noise` is None.
    """
    if step_noise is None and np.any(table.d):
        raise ValueError("the table takes fresh noise at its steps; give step_noise, such as SeedNoise.of_step")
    latents = table.initial_scale * noise if known is None else known.start(table)[None]
    before = denoised = torch.zeros_like(latents)
    for step_index in range(table.num_inference_steps):
        rows = gather_rows([(table, step_index)] * len(latents), latents.device)
        model_output = predict(latents, rows[:, 0])
        fresh = None
        if step_noise is not None and table.d[step_index]:
            fresh = step_noise(step_index).to(latents.device)
        oldest = before if table.e[step_index] else None
        before, (latents, denoised) = denoised, apply_step(rows, latents, model_output, denoised, fresh, oldest)
        if known is not None:
            latents = known.after_step(latents, table, step_index)
        yield latents, denoised
