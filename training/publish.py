"""Write a checkpoint folder: diffusers layout, safetensors, and the recipe with every file's hash."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from tdm_runtime.checkpoint import WEIGHT_FILES, file_sha256, open_checkpoint
from tdm_runtime.noise_schedule import DiffusionSchedule
from tdm_runtime.recipe import RECIPE_FILE, Recipe
from training.emoji.student import build_recipe


def write_checkpoint(
    folder: Path,
    recipe: Recipe,
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write and check a checkpoint; stock diffusers pipelines read it too.

    Raises:
        CheckpointError: what was written would not be served.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for part, module in (("unet", unet), ("vae", vae), ("text_encoder", text_encoder)):
        module.to(dtype).save_pretrained(folder / part)
    tokenizer.save_pretrained(folder / "tokenizer")
    _diffusers_scheduler(recipe).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps(_model_index(), indent=2) + "\n", encoding="utf-8")
    hashes = {name: file_sha256(folder / name) for name in WEIGHT_FILES}
    (folder / RECIPE_FILE).write_text(replace(recipe, files=hashes).to_json(), encoding="utf-8")
    open_checkpoint(folder)


def publish(folder: Path, autoencoder: Path, teacher: Path, student: Path) -> None:
    """Assemble the checkpoint from the stages' folders."""
    write_checkpoint(
        folder,
        build_recipe(),
        UNet2DConditionModel.from_pretrained(student / "unet"),
        AutoencoderKL.from_pretrained(autoencoder / "vae"),
        CLIPTextModel.from_pretrained(teacher / "text_encoder"),
        CLIPTokenizer.from_pretrained(teacher / "tokenizer"),
    )


def _diffusers_scheduler(recipe: Recipe) -> DDIMScheduler:
    """What makes a stock pipeline sample as the recipe does, with guidance_scale = K + 1."""
    schedule = recipe.noise_schedule
    assert isinstance(schedule, DiffusionSchedule), "stock DDIM knows diffusion schedules only"
    return DDIMScheduler(
        beta_schedule=schedule.beta_schedule,
        beta_start=schedule.beta_start,
        beta_end=schedule.beta_end,
        prediction_type=recipe.prediction_type,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=0,
    )


def _model_index() -> dict[str, object]:
    return {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
