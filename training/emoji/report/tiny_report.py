"""Scores of a checkpoint's tiny and full autoencoder, as a Markdown table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor

from tdm_runtime.checkpoint.folder import open_checkpoint
from tdm_runtime.model.decoder import Pixels
from tdm_runtime.model.similarity import psnr_db
from training.emoji.data.scenes import Scene, caption
from training.emoji.report.features import features_of, load_features
from training.emoji.report.score import Score
from training.emoji.report.scores import Yardstick
from training.emoji.stages.autoencoder import to_pixels
from training.emoji.stages.tiny_autoencoder import CHUNK, StudentSampler, in_chunks, to_bytes


@dataclass(frozen=True)
class Autoencoders:
    """Both autoencoders of a checkpoint, float32: latents [B, 4, 16, 16] of unit spread, pixels in [-1, 1]."""

    full: AutoencoderKL
    tiny: AutoencoderTiny

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Encode pixels with the full encoder. Return means."""
        scale = self.full.config.scaling_factor
        return in_chunks(lambda part: scale * self.full.encode(part).latent_dist.mode(), pixels)

    @torch.no_grad()
    def encode_tiny(self, pixels: Tensor) -> Tensor:
        """Encode pixels with the tiny encoder."""
        return in_chunks(lambda part: self.tiny.encode(part).latents, pixels)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents with the full decoder. Return clamped pixels."""
        scale = self.full.config.scaling_factor
        return in_chunks(lambda part: self.full.decode(part / scale).sample.clamp(-1, 1), latents)

    @torch.no_grad()
    def decode_tiny(self, latents: Tensor) -> Tensor:
        """Decode latents with the tiny decoder. Return clamped pixels."""
        return in_chunks(lambda part: self.tiny.decode(part).sample.clamp(-1, 1), latents)


@dataclass(frozen=True)
class DecoderScore:
    """Scores of one decoder on some latents."""

    score: Score
    frechet: float
    """Frechet distance to the drawn scenes."""


def load_autoencoders(checkpoint: Path) -> Autoencoders:
    """Load both autoencoders of a checkpoint.

    Raises:
        CheckpointError: The checkpoint has no tiny autoencoder, or cannot be opened.
    """
    opened = open_checkpoint(checkpoint)
    return Autoencoders(opened.load_vae(), opened.load_tiny_vae())


def student_latents(student: StudentSampler, captions: list[str]) -> Mapping[str, Tensor]:
    """Return latents [B, 4, 16, 16] by name: of pictures at every K, and of estimates after the first step.

    Caption n has the seed n.
    """
    finals, firsts = {}, {}
    for step_count in student.trajectories.step_counts:
        chunks = [captions[start : start + CHUNK] for start in range(0, len(captions), CHUNK)]
        estimates = torch.cat(
            [student.estimates(chunk, step_count, n * CHUNK) for n, chunk in enumerate(chunks)], dim=1
        )
        finals[f"student, K = {step_count}"] = estimates[-1]
        if step_count > 1:
            firsts[f"estimate after step 1 of {step_count}"] = estimates[0]
    return finals | firsts


def print_tiny_vae(checkpoint: Path, count: int = 250) -> None:
    """Print the table, with latents down and the scores of both decoders across.

    Args:
        count: Number of scenes of the training distribution, and of held-out ones.

    Raises:
        CheckpointError: The checkpoint has no tiny autoencoder.
        FileNotFoundError: The feature network is not trained.
    """
    both, yardstick = load_autoencoders(checkpoint), Yardstick(count, load_features())
    scenes = [*yardstick.seen, *yardstick.unseen]
    drawings = to_pixels(np.stack([yardstick.scorer.draw(scene) for scene in scenes]))
    latents = {
        **student_latents(StudentSampler(checkpoint, checkpoint), [caption(scene) for scene in scenes]),
        "drawings, encoded": both.encode(drawings),
        "drawings, tiny encoder": both.encode_tiny(drawings),
    }
    print(
        "| latents | tiny to full, dB | adherence, full | tiny | PSNR to drawing, dB, full | tiny "
        "| Frechet distance to drawings, full | tiny |\n|---|---|---|---|---|---|---|---|"
    )
    for name, given in latents.items():
        full, tiny = both.decode(given), both.decode_tiny(given)
        likeness_db = psnr_db(tiny.numpy(), full.numpy(), peak=2.0)
        print(_row(name, likeness_db, *(_measure(pixels, scenes, yardstick) for pixels in (full, tiny))))


def _measure(pixels: Tensor, scenes: list[Scene], yardstick: Yardstick) -> DecoderScore:
    pictures: list[Pixels] = list(to_bytes(pixels).permute(0, 2, 3, 1).numpy())
    frechet = yardstick.to_drawn(features_of(yardstick.network, pictures))
    return DecoderScore(yardstick.scorer.score(pictures, scenes), frechet)


def _row(name: str, likeness_db: float, full: DecoderScore, tiny: DecoderScore) -> str:
    measures = (
        (f"{each.score.adherence:.3f}" for each in (full, tiny)),
        (f"{each.score.psnr_db:.2f}" for each in (full, tiny)),
        (f"{each.frechet:.2f}" for each in (full, tiny)),
    )
    cells = [name, f"{likeness_db:.2f}", *(cell for pair in measures for cell in pair)]
    return f"| {' | '.join(cells)} |"
