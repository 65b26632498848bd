"""Latents -> pixels, in calls that fit into memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tdm_runtime.backends import Backend
from tdm_runtime.families import family_of_vae

Pixels = NDArray[np.uint8]

MAX_CALL_PIXELS = 1024 * 1024
"""Of one decoder call. A KL autoencoder of full size holds about 6 GB of activations for as many in float32."""
TILE_OVERLAP = 0.25
"""Share of a tile's side that it has in common with the next."""


class Decoder:
    """Decoder of an autoencoder. Batches that are too large for one call are sliced, pictures that are, tiled."""

    def __init__(self, backend: Backend, downscale: int, max_call_pixels: int = MAX_CALL_PIXELS) -> None:
        self.backend = backend
        self.downscale = downscale
        """Pixels per latent, each side."""
        self._max_call_latents = max_call_pixels // downscale**2

    def decode(self, latents: Tensor) -> Pixels:
        """Return uint8 [B, H, W, 3] for latents [B, C, h, w], or [B, frames, H, W, 3] for latents [B, C, F, h, w].

        H = h * downscale, W = w * downscale.
        """
        samples_a_call = self._max_call_latents // math.prod(latents.shape[2:])
        if samples_a_call == 0:
            return np.stack([self._tiled(sample) for sample in latents])
        slices = [self.backend(part).cpu().numpy() for part in torch.split(latents, samples_a_call)]
        return slices[0] if len(slices) == 1 else np.concatenate(slices)

    def _tiled(self, latents: Tensor) -> Pixels:
        """Decode one sample, latents [C, h, w] or [C, F, h, w], in overlapping tiles that fade into each other."""
        num_latent_frames = math.prod(latents.shape[1:-2])
        side = max(1, int((self._max_call_latents / num_latent_frames) ** 0.5))
        height, width = (size * self.downscale for size in latents.shape[-2:])
        total: NDArray[np.float32] | None = None
        weights = np.zeros((height, width, 1), dtype=np.float32)
        for top in _tile_starts(latents.shape[-2], side):
            for left in _tile_starts(latents.shape[-1], side):
                tile = latents[None, ..., top : top + side, left : left + side].contiguous()
                pixels = self.backend(tile)[0].cpu().numpy()
                rows, columns = (
                    slice(s * self.downscale, s * self.downscale + n)
                    for s, n in zip((top, left), pixels.shape[-3:-1], strict=True)
                )
                fade = np.outer(_fade(rows, height), _fade(columns, width))[..., None]
                if total is None:
                    total = np.zeros((*pixels.shape[:-3], height, width, 3), dtype=np.float32)
                total[..., rows, columns, :] += fade * pixels
                weights[rows, columns] += fade
        assert total is not None, "a picture has at least one tile"
        blended: Pixels = (total / weights).round().astype(np.uint8)
        return blended


def torch_decoder(vae: Any, device: torch.device, threads: int | None = None) -> Decoder:
    """Return the decoder of a diffusers VAE that is in memory already, run by PyTorch in float32.

    Raises:
        CheckpointError: it is the VAE of no family.
    """
    from tdm_runtime.backends.pytorch import TorchBackend

    family = family_of_vae(vae)
    backend = TorchBackend(family.decoder(vae), device, threads=threads)
    return Decoder(backend, family.spatial_compression(vae.config))


def _tile_starts(size: int, side: int) -> Iterator[int]:
    """Where tiles begin: every one full, the last at the end, neighbours at least `TILE_OVERLAP` in common."""
    if size <= side:
        yield 0
        return
    stride = max(1, int(side * (1 - TILE_OVERLAP)))
    yield from range(0, size - side, stride)
    yield size - side


def _fade(tile: slice, whole: int) -> NDArray[np.float32]:
    """Weights of a tile along one side, positive everywhere: they rise from an edge over the overlap.

    Not from the picture's own edges: there the tile is right, and one that begins close by is not yet.
    """
    size = tile.stop - tile.start
    rising: NDArray[np.float32] = np.minimum(1.0, (np.arange(size) + 0.5) / (size * TILE_OVERLAP)).astype(np.float32)
    rising_from_start = rising if tile.start > 0 else np.ones_like(rising)
    return np.minimum(rising_from_start, rising[::-1] if tile.stop < whole else np.ones_like(rising))
