"""Ways to run a denoiser: callables of one signature.

A backend maps (latents [B, C, H, W], timesteps [B], step_counts [B], prompt_embeds [B, L, D]) to
the model output [B, C, H, W], all float32 torch tensors on its `device`.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class DenoiserBackend(Protocol):
    """What `DiffusionEngine` calls once a step."""

    name: str
    device: torch.device

    def __call__(self, latents: Tensor, timesteps: Tensor, step_counts: Tensor, prompt_embeds: Tensor) -> Tensor: ...
