"""The reference backend: the PyTorch module itself, float32."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TorchBackend:
    """Calls a denoiser module without gradients."""

    name = "torch"

    def __init__(self, denoiser: nn.Module, device: torch.device) -> None:
        self.device = device
        self._denoiser = denoiser.to(device).eval()

    @torch.inference_mode()
    def __call__(self, latents: Tensor, timesteps: Tensor, step_counts: Tensor, prompt_embeds: Tensor) -> Tensor:
        output: Tensor = self._denoiser(latents, timesteps, step_counts, prompt_embeds)
        return output
