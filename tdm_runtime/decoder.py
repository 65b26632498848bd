"""Latents -> pixels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

Pixels = NDArray[np.uint8]


class Decoder:
    """A KL autoencoder's decoder."""

    def __init__(self, vae: AutoencoderKL, device: torch.device) -> None:
        self._vae = vae.to(device)
        self._scaling_factor = float(vae.config.scaling_factor)
        self._shift_factor = float(vae.config.get("shift_factor") or 0.0)
        self.downscale = 2 ** (len(vae.config.block_out_channels) - 1)
        """Pixels per latent, each side."""

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Pixels:
        """Return uint8 [B, H, W, 3] for latents [B, C, H / downscale, W / downscale]."""
        pixels = self._vae.decode(latents / self._scaling_factor + self._shift_factor, return_dict=False)[0]
        rounded = (pixels.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)
        picture: Pixels = rounded.permute(0, 2, 3, 1).contiguous().cpu().numpy()
        return picture
