"""The first stage of TDM-unify-SFT: fine-tuning of the teacher on a small, clean set (sec. 3.1).

Clean means without the jitter of place and size that the training set has and captions do not mention.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from shutil import copytree

import numpy as np
import torch
from diffusers import AutoencoderKL

from training.emoji.data.scenes import Scene, render, sample_scene
from training.emoji.stages.autoencoder import SceneRenderer, to_pixels
from training.emoji.stages.student import ScenePrompts, load_denoiser
from training.emoji.stages.teacher import COORDINATES
from training.methods.roles import CleanEstimator
from training.pretrained.student_files import save_denoiser
from training.run.finetune import FinetuneConfig, finetune

CURATED_SEED = 77
CURATED_SCENES = 3000
CURATED = FinetuneConfig(
    steps=250,
    batch_size=32,
    learning_rate=2e-4,
    warmup_steps=20,
    final_lr_share=0.05,
    ema_decay=0.98,
)


@torch.no_grad()
def encode_curated(file: Path, autoencoder_folder: Path) -> None:
    """Write latents of the clean scenes of stream `CURATED_SEED`: [N, 4, 16, 16] float16, of unit spread."""
    autoencoder = AutoencoderKL.from_pretrained(autoencoder_folder / "vae").eval()
    renderer = SceneRenderer(CURATED_SEED)
    latents = []
    for start in range(0, CURATED_SCENES, 250):
        numbers = range(start, min(start + 250, CURATED_SCENES))
        scenes = (sample_scene(renderer.glyphs, CURATED_SEED, n) for n in numbers)
        pixels = to_pixels(np.stack([render(replace(s, jitter=Scene.jitter), renderer.pictures) for s in scenes]))
        latents.append(autoencoder.encode(pixels).latent_dist.mode() * autoencoder.config.scaling_factor)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial.npy")
    np.save(partial, torch.cat(latents).half().numpy())
    partial.rename(file)


def finetune_teacher(folder: Path, teacher_folder: Path, autoencoder_folder: Path) -> None:
    """Fine-tune or resume. Write a teacher to `folder`, with an unchanged text encoder."""
    latents = folder / "latents.npy"
    if not latents.is_file():
        encode_curated(latents, autoencoder_folder)
    for part in ("text_encoder", "tokenizer"):
        copytree(teacher_folder / part, folder / part, dirs_exist_ok=True)
    estimator = CleanEstimator(load_denoiser(teacher_folder / "unet"), COORDINATES)
    average = finetune(folder, estimator, ScenePrompts(teacher_folder, CURATED_SEED, latents), CURATED)
    save_denoiser(average, folder)  # type: ignore[arg-type]
