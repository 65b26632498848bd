"""Fine-tuned teachers: one made from a published checkpoint, TDM-unify-SFT's (sec. 3.1), and unseen bases (Table 2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import copytree

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from training.emoji.data.glyphs import load_glyphs, render_glyphs
from training.emoji.data.scenes import Scene, render, sample_scene
from training.emoji.stages.autoencoder import to_pixels
from training.emoji.stages.student import LATENTS_SEED, ScenePrompts, load_denoiser
from training.emoji.stages.teacher import COORDINATES, encode_items, save_teacher
from training.methods.roles import CleanEstimator
from training.pretrained.student_files import save_denoiser
from training.run.finetune import FinetuneConfig, finetune


def as_drawn(pixels: Tensor) -> Tensor:
    """Return pixels unchanged."""
    return pixels


def other_palette(pixels: Tensor) -> Tensor:
    """Return pixels [B, 3, H, W] in other colours: red becomes green, green becomes blue, blue becomes red."""
    return pixels.roll(1, dims=1)


@dataclass(frozen=True)
class SceneSet:
    """Pictures that a teacher is fine-tuned on: scenes 0 to count - 1 of a stream, and how they are drawn."""

    seed: int
    count: int
    style: Callable[[Tensor], Tensor] = as_drawn
    """Function of pixels, [B, 3, H, W] in [-1, 1]."""
    is_clean: bool = True
    """Whether the jitter of place and size is left out, which the training set has and captions do not mention."""

    def encode(self, file: Path, autoencoder_folder: Path) -> None:
        """Write the latents of the scenes: [N, 4, 16, 16] float16, of unit spread."""
        autoencoder = AutoencoderKL.from_pretrained(autoencoder_folder / "vae").eval()
        glyphs = load_glyphs()
        pictures = render_glyphs(glyphs)

        def pixels(numbers: range) -> Tensor:
            scenes = [sample_scene(glyphs, self.seed, n) for n in numbers]
            if self.is_clean:
                scenes = [replace(scene, jitter=Scene.jitter) for scene in scenes]
            return self.style(to_pixels(np.stack([render(scene, pictures) for scene in scenes])))

        encode_items(file, autoencoder, (self.count, 4, 16, 16), pixels)


RESTORED_SET = SceneSet(seed=LATENTS_SEED, count=6000, is_clean=False)
RESTORED = FinetuneConfig(
    steps=240, batch_size=32, learning_rate=4e-4, warmup_steps=20, final_lr_share=0.02, ema_decay=0.98
)
"""Settings of `restore_teacher`."""

CURATED_BASE = "teacher-sft"
BASES: Mapping[str, SceneSet] = {
    CURATED_BASE: SceneSet(seed=77, count=1280),
    "teacher-palette": SceneSet(seed=78, count=1280, style=other_palette),
}
"""Folder in the run -> pictures that this fine-tuned teacher learned."""
BASE = FinetuneConfig(steps=80, batch_size=16, learning_rate=3e-4, warmup_steps=5, final_lr_share=0.05, ema_decay=0.95)
"""Settings of the fine-tuning of each of `BASES`."""


def restore_teacher(run: Path, checkpoint: Path, config: FinetuneConfig = RESTORED) -> None:
    """Make a teacher from a published student by the denoising loss, or resume. Hours of training are not needed.

    Writes `run/teacher` and `run/autoencoder` in diffusers layout, in float32. The student's denoiser, whose input for
    K is set to zero, learns to denoise at every timestep, with and without a caption. The text encoder and the
    autoencoder are the checkpoint's.

    Raises:
        FileExistsError: The run holds another teacher.
    """
    folder = run / "teacher"
    start = folder / "start"
    if (folder / "unet").is_dir() and not start.is_dir():
        raise FileExistsError(f"{folder} holds a teacher; give another --run to make one from {checkpoint}")
    if not start.is_dir():
        vae = AutoencoderKL.from_pretrained(checkpoint / "vae", torch_dtype=torch.float32)
        vae.save_pretrained(run / "autoencoder" / "vae")
        denoiser = load_denoiser(checkpoint / "unet")
        torch.nn.init.zeros_(denoiser.timestep_embedding.cond_proj.weight)
        text_encoder = CLIPTextModel.from_pretrained(checkpoint / "text_encoder", dtype=torch.float32)
        tokenizer = CLIPTokenizer.from_pretrained(checkpoint / "tokenizer")
        partial = folder / "start.partial"
        save_teacher(partial, denoiser.model, text_encoder, tokenizer)
        partial.rename(start)
    finetune_teacher(folder, start, run / "autoencoder", RESTORED_SET, config)


def finetune_teacher(
    folder: Path, teacher_folder: Path, autoencoder_folder: Path, scenes: SceneSet, config: FinetuneConfig = BASE
) -> None:
    """Fine-tune or resume. Write a teacher to `folder`, with an unchanged text encoder."""
    latents = folder / "latents.npy"
    if not latents.is_file():
        scenes.encode(latents, autoencoder_folder)
    for part in ("text_encoder", "tokenizer"):
        copytree(teacher_folder / part, folder / part, dirs_exist_ok=True)
    estimator = CleanEstimator(load_denoiser(teacher_folder / "unet"), COORDINATES)
    average = finetune(folder, estimator, ScenePrompts(teacher_folder, scenes.seed, latents), config)
    save_denoiser(average, folder)  # type: ignore[arg-type]
