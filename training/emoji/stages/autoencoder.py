"""Stage 1: the KL autoencoder, pixels [B, 3, 64, 64] in [-1, 1] <-> latents [B, 4, 16, 16].

A later stage trains the decoder further. It changes neither latents nor teacher nor student.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor

from tdm_runtime.model.similarity import psnr_db
from training.emoji.data.glyphs import Glyph, load_glyphs, render_glyphs
from training.emoji.data.scenes import render, sample_scene
from training.methods.precision import autocast
from training.run.loop import LoopConfig, Trainable, descend, learning_rate_at, run_loop, set_learning_rate, update_ema

STAGE = "autoencoder"
DECODER_STAGE = "decoder"
FIRST_DECODER_SCENE = 10**6
"""Number of the decoder stage's first scene, far beyond the scenes of the autoencoder stage."""


@dataclass(frozen=True)
class AutoencoderConfig:
    """Settings of the autoencoder's training."""

    loop: LoopConfig = LoopConfig(steps=3200)
    batch_size: int = 32
    learning_rate: float = 1e-3
    kl_weight: float = 1e-4
    """Weight of the KL term per latent element. It is small because `scaling_factor` normalises the latents."""
    edge_weight: float = 0.5
    """Weight of the L1 distance between finite differences, which keeps outlines sharp."""
    ema_decay: float = 0.995


@dataclass(frozen=True)
class DecoderConfig:
    """Settings of the decoder's further training."""

    loop: LoopConfig = LoopConfig(steps=1600)
    batch_size: int = 32
    learning_rate: float = 6e-4
    edge_weight: float = 0.5
    """Weight of the L1 distance between finite differences, at every octave."""
    octaves: int = 3
    """Number of sizes at which pictures are compared: 64, 32 and 16 pixels."""
    latent_noise: float = 0.1
    """Greatest deviation of the noise on latents of spread 1, because a student's latents are never exact."""
    ema_decay: float = 0.998


def build_autoencoder() -> AutoencoderKL:
    """Return an untrained autoencoder of 0.9 M parameters. Latents have 4 channels and a quarter of the side."""
    return AutoencoderKL(
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        mid_block_add_attention=False,
        sample_size=64,
    )


class SceneRenderer:
    """Draws numbered scenes. It draws each glyph once and keeps it."""

    def __init__(self, seed: int) -> None:
        self.glyphs: tuple[Glyph, ...] = load_glyphs()
        self.pictures = render_glyphs(self.glyphs)
        self.seed = seed

    def pixels(self, indices: range, *, held_out: bool = False) -> Tensor:
        """Return the pictures of scenes, [B, 3, 64, 64] in [-1, 1]."""
        scenes = (sample_scene(self.glyphs, self.seed, i, held_out=held_out) for i in indices)
        return to_pixels(np.stack([render(scene, self.pictures) for scene in scenes]))


def to_pixels(pictures: NDArray[np.uint8]) -> Tensor:
    """Convert uint8 [B, H, W, 3] to float [B, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def reconstruction_loss(output: Tensor, pixels: Tensor, edge_weight: float) -> Tensor:
    """Return the L1 loss of pixels plus that of horizontal and vertical differences. Both are [B, 3, H, W]."""
    error = output - pixels
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + edge_weight * edges


def octaves_loss(output: Tensor, pixels: Tensor, edge_weight: float, octaves: int) -> Tensor:
    """Return the mean `reconstruction_loss` over `octaves` sizes, each half the one before.

    Large sizes sharpen outlines, small sizes keep shapes and colours. The loss uses no feature network, because
    the Frechet distance that scores the decoder is measured in one.

    Args:
        output: Pictures [B, 3, H, W]. H and W are divisible by 2 ** (octaves - 1).
        pixels: Pictures shaped as output.
    """
    losses = []
    for octave in range(octaves):
        losses.append(reconstruction_loss(output, pixels, edge_weight))
        if octave < octaves - 1:
            output, pixels = F.avg_pool2d(output, 2), F.avg_pool2d(pixels, 2)
    return torch.stack(losses).mean()


def train_autoencoder(folder: Path, config: AutoencoderConfig) -> None:
    """Train or resume. Write `folder/vae` in diffusers layout, with the measured `scaling_factor`."""
    torch.manual_seed(config.loop.seed)
    model, average = build_autoencoder(), build_autoencoder()
    average.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    renderer = SceneRenderer(config.loop.seed)
    held_out = renderer.pixels(range(128), held_out=True)

    def train_step(step: int, generator: torch.Generator) -> dict[str, float]:
        set_learning_rate(optimizer, learning_rate_at(step, config.loop.steps, config.learning_rate))
        pixels = renderer.pixels(range(step * config.batch_size, (step + 1) * config.batch_size))
        with autocast():
            posterior = model.encode(pixels).latent_dist
            output = model.decode(posterior.sample(generator)).sample
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        reconstruction = reconstruction_loss(output.float(), pixels, config.edge_weight)
        norm = descend(optimizer, reconstruction + config.kl_weight * kl)
        update_ema(average, model, step, config.ema_decay)
        return {"loss": reconstruction.item(), "kl": kl.item(), "grad_norm": norm}

    run_loop(
        folder,
        STAGE,
        config.loop,
        Trainable({"model": model, "average": average}, {"model": optimizer}),
        train_step,
        evaluate=lambda _: {"psnr_db": reconstruction_db(average, held_out)},
        evaluate_every=500,
    )
    average.register_to_config(scaling_factor=1.0 / latent_spread(average, renderer.pixels(range(512))))
    average.save_pretrained(folder / "vae")


def train_decoder(folder: Path, autoencoder_folder: Path, config: DecoderConfig) -> None:
    """Train the decoder of `autoencoder_folder/vae` further, or resume. Write `folder/vae` in diffusers layout.

    The encoder and `scaling_factor` do not change. The log holds the PSNR of held-out scenes before
    (`psnr_before_db`) and after (`psnr_db`).
    """
    torch.manual_seed(config.loop.seed)
    model = AutoencoderKL.from_pretrained(autoencoder_folder / "vae").requires_grad_(False)
    average = copy.deepcopy(model)
    model.to(memory_format=torch.channels_last)  # a tenth faster; the average, which is saved, keeps the usual format
    parameters = [*model.decoder.parameters(), *model.post_quant_conv.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    for parameter in parameters:
        parameter.requires_grad_(True)
    renderer = SceneRenderer(config.loop.seed)
    held_out = renderer.pixels(range(128), held_out=True)
    before = reconstruction_db(model, held_out)

    def train_step(step: int, generator: torch.Generator) -> dict[str, float]:
        set_learning_rate(optimizer, learning_rate_at(step, config.loop.steps, config.learning_rate))
        first = FIRST_DECODER_SCENE + step * config.batch_size
        pixels = renderer.pixels(range(first, first + config.batch_size))
        latents = noisy_latents(model, pixels, config.latent_noise, generator)
        with autocast():
            output = model.decode(latents / model.config.scaling_factor).sample
        loss = octaves_loss(output.float(), pixels, config.edge_weight, config.octaves)
        norm = descend(optimizer, loss)
        update_ema(average, model, step, config.ema_decay)
        return {"loss": loss.item(), "grad_norm": norm}

    run_loop(
        folder,
        DECODER_STAGE,
        config.loop,
        Trainable({"model": model, "average": average}, {"model": optimizer}),
        train_step,
        evaluate=lambda _: {"psnr_before_db": before, "psnr_db": reconstruction_db(average, held_out)},
        evaluate_every=500,
    )
    average.save_pretrained(folder / "vae")


@torch.no_grad()
def noisy_latents(model: AutoencoderKL, pixels: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    """Return latents of unit spread, each with noise of a random deviation from 0 to `noise`."""
    with autocast():
        mode = model.encode(pixels).latent_dist.mode()
    latents: Tensor = mode.float() * model.config.scaling_factor
    deviation = noise * torch.rand(len(latents), 1, 1, 1, generator=generator)
    return latents + deviation * torch.randn(latents.shape, generator=generator)


@torch.no_grad()
def reconstruction_db(model: AutoencoderKL, pixels: Tensor) -> float:
    """Peak signal-to-noise ratio of the reconstruction of [B, 3, H, W] in [-1, 1], in decibels."""
    output = model.decode(model.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
    return psnr_db(output.numpy(), pixels.numpy(), peak=2.0)


@torch.no_grad()
def latent_spread(model: AutoencoderKL, pixels: Tensor) -> float:
    """Return the root mean square of the unscaled latents."""
    return float(model.encode(pixels).latent_dist.mode().square().mean().sqrt())
