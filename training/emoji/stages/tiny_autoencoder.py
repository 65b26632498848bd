"""Stage 4: a tiny autoencoder that can replace the full one, as TAESD does for Stable Diffusion's.

It is diffusers' AutoencoderTiny (Ollin Boer Bohan, https://github.com/madebyollin/taesd). Its decoder
learns the full decoder's pictures, its encoder learns the full encoder's latents. Both use the
denoiser's latents: unit spread, `scaling_factor` 1.

The training pairs are made once and kept on disk. They contain latents of drawings, the student's final
latents at every K, and its estimates after the earlier steps, which previews show.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors.torch import load_file, save_file
from torch import Tensor

from tdm_runtime.checkpoint.folder_files import TINY_VAE
from tdm_runtime.model.similarity import psnr_db
from tdm_runtime.sampling.noise import initial_noise
from training.emoji.data.scenes import caption, sample_scene
from training.emoji.stages.autoencoder import SceneRenderer, octaves_loss
from training.emoji.stages.student import LATENT_SHAPE, ScenePrompts, build_recipe, load_denoiser
from training.emoji.stages.teacher import COORDINATES
from training.methods.precision import autocast
from training.methods.roles import CleanEstimator
from training.methods.trajectory import advance, build_trajectories, places_at
from training.run.loop import (
    LoopConfig,
    Trainable,
    descend,
    learning_rate_at,
    run_loop,
    set_learning_rate,
    step_generator,
    update_ema,
)

STAGE = "tiny-autoencoder"
PAIRS_FILE = "pairs.safetensors"
FIRST_SCENE = 2 * 10**6
"""Number of the first scene, far beyond the scenes of the earlier stages."""
FIRST_SEED = 10**7
"""First seed of the student's noise, far from the seeds of the scores."""
CHUNK = 50
"""Number of pictures that are encoded, decoded or sampled in one call."""


@dataclass(frozen=True)
class TinyAutoencoderConfig:
    """Settings of the tiny autoencoder's training."""

    loop: LoopConfig = LoopConfig(steps=5000)
    batch_size: int = 32
    """Latents to decode in an iteration. Half as many drawings are encoded."""
    learning_rate: float = 2e-3
    edge_weight: float = 0.5
    """Weight of the L1 distance between finite differences, at every octave."""
    octaves: int = 3
    """Number of sizes at which pictures are compared: 64, 32 and 16 pixels."""
    square_weight: float = 8.0
    """Weight of the mean squared error at full size, which corrects the few worst pixels first."""
    ema_decay: float = 0.998
    drawings: int = 6000
    """Number of drawn scenes to encode. Their latents are decoded too."""
    captions: int = 1500
    """Number of captions for the student at each K. The estimate of every step is decoded."""
    held_out: int = 48
    """Number of held-out drawings, and of held-out captions at each K, for measurements."""


@dataclass(frozen=True)
class Pairs:
    """Inputs, and the outputs of the full autoencoder."""

    latents: Tensor
    """Latents to decode, [N, 4, 16, 16] float16, of unit spread."""
    pictures: Tensor
    """Pictures of the full decoder, [N, 3, 64, 64] uint8."""
    drawings: Tensor
    """Pictures to encode, [M, 3, 64, 64] uint8."""
    means: Tensor
    """Mean latents of the full encoder, [M, 4, 16, 16] float16, of unit spread."""

    def decoding(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return latents [B, 4, 16, 16] and pixels [B, 3, 64, 64] in [-1, 1], float32."""
        return self.latents[indices].float(), from_bytes(self.pictures[indices])

    def encoding(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return pixels [B, 3, 64, 64] in [-1, 1] and latents [B, 4, 16, 16], float32."""
        return from_bytes(self.drawings[indices]), self.means[indices].float()


def build_tiny_autoencoder() -> AutoencoderTiny:
    """Return an untrained tiny autoencoder of 0.43 M parameters. No residual block runs at 64 pixels, to save time."""
    width = (32, 32, 32)
    return AutoencoderTiny(
        encoder_block_out_channels=width,
        decoder_block_out_channels=width,
        num_encoder_blocks=(0, 3, 4),
        num_decoder_blocks=(4, 3, 0),
        latent_channels=LATENT_SHAPE[0],
        scaling_factor=1.0,
    )


class StudentSampler:
    """Sampler of a trained student that returns the clean estimate of every step."""

    def __init__(self, text_folder: Path, student_folder: Path) -> None:
        """Load a student.

        Args:
            text_folder: Folder with text_encoder/ and tokenizer/.
            student_folder: Folder with unet/. A checkpoint folder can serve as both.
        """
        recipe = build_recipe()
        self.trajectories = build_trajectories(COORDINATES, recipe.solver, recipe.timesteps)
        self._estimate = CleanEstimator(load_denoiser(student_folder / "unet").eval(), COORDINATES)
        self._prompts = ScenePrompts(text_folder, seed=0)
        self._prompts.text_encoder.float()

    @torch.no_grad()
    def estimates(self, captions: list[str], step_count: int, first_seed: int) -> Tensor:
        """Return the estimate of every step, latents [K, B, 4, 16, 16] of unit spread. The last is the picture's.

        Caption n starts from the noise of seed `first_seed` + n, as in serving.
        """
        conditioning = self._prompts.encode(captions)
        x = torch.stack([initial_noise(first_seed + n, LATENT_SHAPE) for n in range(len(captions))])
        step_counts, found = torch.full((len(x),), step_count), list[Tensor]()
        for row in range(step_count):
            places = places_at(self.trajectories, step_counts, torch.full_like(step_counts, row))
            previous = found[-1] if found else None
            x, x_0 = advance(
                self._estimate, self.trajectories, x, places, conditioning, previous, step_counts=step_counts
            )
            found.append(x_0)
        return torch.stack(found)


def numbered_captions(renderer: SceneRenderer, numbers: range, *, held_out: bool) -> list[str]:
    """Return the caption of each scene. The number decides the wording."""
    scenes = (sample_scene(renderer.glyphs, renderer.seed, n, held_out=held_out) for n in numbers)
    return [caption(scene, random.Random(n)) for n, scene in zip(numbers, scenes, strict=True)]


def make_pairs(
    vae: AutoencoderKL,
    student: StudentSampler,
    seed: int,
    drawings: int,
    captions: int,
    *,
    held_out: bool = False,
) -> Pairs:
    """Make pairs from drawn scenes and from the student's estimates, with the full autoencoder's outputs.

    Args:
        seed: Seed of the stream of scenes and of the encoder's sampling noise.
        drawings: Number of drawn scenes.
        captions: Number of captions for the student at each K.
        held_out: Whether the scenes are combinations that training never sees.
    """
    renderer = SceneRenderer(seed)
    drawn, means, latents = list[Tensor](), list[Tensor](), list[Tensor]()
    for numbers in _ranges(FIRST_SCENE, drawings):
        pixels = renderer.pixels(numbers, held_out=held_out)
        mean, sampled = encode(vae, pixels, step_generator(seed, STAGE, numbers.start))
        drawn.append(to_bytes(pixels))
        means.append(mean.half())
        latents.append(sampled.half())
    for step_count in student.trajectories.step_counts:
        for numbers in _ranges(FIRST_SCENE + step_count * captions, captions):
            texts = numbered_captions(renderer, numbers, held_out=held_out)
            first_seed = FIRST_SEED + numbers.start
            latents.append(student.estimates(texts, step_count, first_seed).flatten(0, 1).half())
    found = torch.cat(latents)
    pictures = in_chunks(lambda chunk: to_bytes(decode(vae, chunk.float())), found)
    return Pairs(found, pictures, torch.cat(drawn), torch.cat(means))


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the mean and a sample of each picture's latents, [B, 4, 16, 16] of unit spread."""
    with autocast():
        posterior = vae.encode(pixels).latent_dist
    scale = vae.config.scaling_factor
    return scale * posterior.mean.float(), scale * posterior.sample(generator).float()


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Decode latents of unit spread with the full decoder: pixels [B, 3, 64, 64], clamped to [-1, 1]."""
    with autocast():
        pixels = vae.decode(latents / vae.config.scaling_factor).sample
    clamped: Tensor = pixels.float().clamp(-1, 1)
    return clamped


def to_bytes(pixels: Tensor) -> Tensor:
    """Convert pixels in [-1, 1] to uint8."""
    return (pixels * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def from_bytes(pixels: Tensor) -> Tensor:
    """Convert uint8 to pixels in [-1, 1]."""
    return pixels.float() / 127.5 - 1.0


def load_pairs(file: Path, vae: AutoencoderKL, student: StudentSampler, config: TinyAutoencoderConfig) -> Pairs:
    """Read the training pairs. The first call makes them and writes the file.

    Raises:
        ValueError: The counts in the file differ from the config.
    """
    if not file.is_file():
        made = make_pairs(vae, student, config.loop.seed, config.drawings, config.captions)
        partial = file.with_suffix(".partial")
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in vars(made).items()}, partial)
        partial.rename(file)
    pairs = Pairs(**load_file(file))
    estimates = config.captions * sum(student.trajectories.step_counts)
    if (len(pairs.drawings), len(pairs.latents)) != (config.drawings, config.drawings + estimates):
        raise ValueError(
            f"{file} holds {len(pairs.drawings)} drawings and {len(pairs.latents)} latents instead of "
            f"{config.drawings} and {config.drawings + estimates}; remove it to make it again"
        )
    return pairs


def train_tiny_autoencoder(
    folder: Path, autoencoder_folder: Path, text_folder: Path, student_folder: Path, config: TinyAutoencoderConfig
) -> None:
    """Train or resume. Write `folder/tiny_vae` in diffusers layout.

    Args:
        autoencoder_folder: Folder with vae/, the full autoencoder.
        text_folder: Folder with text_encoder/ and tokenizer/.
        student_folder: Folder with unet/. A checkpoint folder can serve as all three.
    """
    torch.manual_seed(config.loop.seed)
    model = build_tiny_autoencoder()
    average = copy.deepcopy(model).requires_grad_(False)
    model.to(memory_format=torch.channels_last)  # faster; the average, which is saved, keeps the usual format
    optimizers = {name: _optimizer(getattr(model, name), config) for name in ("encoder", "decoder")}
    vae = AutoencoderKL.from_pretrained(autoencoder_folder / "vae").eval()
    student = StudentSampler(text_folder, student_folder)
    pairs = load_pairs(folder / PAIRS_FILE, vae, student, config)
    unseen = make_pairs(vae, student, config.loop.seed, config.held_out, config.held_out, held_out=True)

    def train_step(step: int, generator: torch.Generator) -> dict[str, float]:
        for optimizer in optimizers.values():
            set_learning_rate(optimizer, learning_rate_at(step, config.loop.steps, config.learning_rate))
        latents, pictures = pairs.decoding(_draw(len(pairs.latents), config.batch_size, generator))
        drawings, means = pairs.encoding(_draw(len(pairs.drawings), config.batch_size // 2, generator))
        with autocast():
            decoded, encoded = model.decode(latents).sample, model.encode(drawings).latents
        octaves = octaves_loss(decoded.float(), pictures, config.edge_weight, config.octaves)
        loss = octaves + config.square_weight * F.mse_loss(decoded.float(), pictures)
        encoder_loss = F.mse_loss(encoded.float(), means)
        norm = descend(optimizers["decoder"], loss)
        encoder_norm = descend(optimizers["encoder"], encoder_loss)
        update_ema(average, model, step, config.ema_decay)
        return {
            "loss": loss.item(),
            "grad_norm": norm,
            "encoder_loss": encoder_loss.item(),
            "encoder_grad_norm": encoder_norm,
        }

    run_loop(
        folder,
        STAGE,
        config.loop,
        Trainable({"model": model, "average": average}, optimizers),
        train_step,
        evaluate=lambda _: likeness(average, unseen),
        evaluate_every=500,
    )
    average.save_pretrained(folder / TINY_VAE)


@torch.no_grad()
def likeness(model: AutoencoderTiny, pairs: Pairs) -> dict[str, float]:
    """Compare with the full autoencoder: PSNR of all pictures in decibels, and RMS error of latents of unit spread."""
    latents, pictures = pairs.decoding(torch.arange(len(pairs.latents)))
    drawings, means = pairs.encoding(torch.arange(len(pairs.drawings)))
    decoded = in_chunks(lambda chunk: model.decode(chunk).sample, latents)
    encoded = in_chunks(lambda chunk: model.encode(chunk).latents, drawings)
    return {
        "psnr_db": psnr_db(decoded.clamp(-1, 1).numpy(), pictures.numpy(), peak=2.0),
        "latent_rms": float((encoded - means).square().mean().sqrt()),
    }


def in_chunks(function: Callable[[Tensor], Tensor], given: Tensor) -> Tensor:
    """Apply `function` to a long batch, one chunk at a time."""
    return torch.cat([function(given[start : start + CHUNK]) for start in range(0, len(given), CHUNK)])


def _optimizer(part: torch.nn.Module, config: TinyAutoencoderConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(part.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)


def _draw(count: int, batch_size: int, generator: torch.Generator) -> Tensor:
    return torch.randint(count, (batch_size,), generator=generator)


def _ranges(first: int, count: int) -> Iterator[range]:
    for start in range(first, first + count, CHUNK):
        yield range(start, min(start + CHUNK, first + count))
