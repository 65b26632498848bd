"""Latents and captions of numbered clips. The latents are encoded once, frame by frame, and kept on disk."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from training.emoji.data.glyphs import render_glyphs
from training.emoji.stages.autoencoder import to_pixels
from training.emoji.stages.teacher import encode_items
from training.emoji_video.clips import FRAMES, ClipRenderer, caption, sample_clip, video_glyphs
from training.methods.precision import Precision

LATENTS_FILE = "latents.npy"
FRAME_SHAPE = (4, 16, 16)
"""Latents of a frame, [C, H, W]."""
CLIPS = 1944


def encode_clips(
    folder: Path, checkpoint: Path, count: int = CLIPS, seed: int = 0, precision: Precision = "fp32"
) -> None:
    """Write `folder/latents.npy` with the latents of clips 0..count - 1, [N, F, 4, 16, 16] float16, if it is missing.

    Args:
        checkpoint: Picture checkpoint, whose autoencoder encodes the frames.
    """
    file = folder / LATENTS_FILE
    if file.is_file():
        return
    glyphs = video_glyphs()
    renderer = ClipRenderer(render_glyphs(glyphs))

    def pixels(numbers: range) -> Tensor:
        return to_pixels(np.concatenate([renderer.render(sample_clip(glyphs, seed, n)) for n in numbers]))

    autoencoder = AutoencoderKL.from_pretrained(checkpoint / "vae").float().eval()
    encode_items(file, autoencoder, (count, FRAMES, *FRAME_SHAPE), pixels, chunk=25, precision=precision)


class LatentClips:
    """Encoded clips and their captions, by number."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        """Open what `encode_clips` wrote.

        Raises:
            FileNotFoundError: The clips are not encoded yet.
        """
        file = folder / LATENTS_FILE
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing; make it with `tdm-train emoji-video clips`")
        self._latents = np.load(file, mmap_mode="r")
        self.glyphs, self.seed = video_glyphs(), seed

    def __len__(self) -> int:
        return len(self._latents)

    def latents(self, numbers: list[int], frames: list[int]) -> Tensor:
        """Return latents of some frames, [B, 4, F, 16, 16] float32."""
        chosen = self._latents[numbers][:, frames].astype(np.float32)
        return torch.from_numpy(chosen).transpose(1, 2).contiguous()

    def captions(self, numbers: list[int], wording_seed: int) -> list[str]:
        """Return captions. The seed decides the wording."""
        rng = random.Random(wording_seed)
        return [caption(sample_clip(self.glyphs, self.seed, n), rng) for n in numbers]
