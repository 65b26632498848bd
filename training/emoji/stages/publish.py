"""Write a checkpoint folder: diffusers layout, safetensors, and the recipe with the hashes of the weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, ModelMixin, UNet2DConditionModel, UNetMotionModel
from transformers import CLIPTextModel, CLIPTokenizer

from tdm_runtime.checkpoint.folder import open_checkpoint, weight_hashes
from tdm_runtime.checkpoint.folder_files import TINY_VAE
from tdm_runtime.checkpoint.recipe import RECIPE_FILE, Recipe
from tdm_runtime.sampling.schedule import DiffusionSchedule
from training.emoji.stages.student import build_recipe

CLIP_INDEX = {
    "_class_name": "AnimateDiffPipeline",
    "motion_adapter": [None, None],
    "unet": ["diffusers", "UNetMotionModel"],
}
"""Entries of model_index.json that differ for a UNet which makes clips."""


def write_checkpoint(
    folder: Path,
    recipe: Recipe,
    unet: UNet2DConditionModel | UNetMotionModel,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    dtype: torch.dtype = torch.float16,
    *,
    tiny_vae: AutoencoderTiny | None = None,
) -> None:
    """Write a checkpoint and check it. Stock diffusers pipelines can read it too.

    Args:
        tiny_vae: Autoencoder for tiny_vae/, which stock pipelines ignore. `StableDiffusionPipeline.from_pretrained(
            folder, vae=AutoencoderTiny.from_pretrained(folder, subfolder="tiny_vae"))` uses it.

    Raises:
        CheckpointError: The runtime cannot open the written folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for part, model in (("unet", unet), ("vae", vae), (TINY_VAE, tiny_vae)):
        if model is not None:
            _save_model(model.to(dtype), folder / part)
    text_encoder.to(dtype).save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    _diffusers_scheduler(recipe).save_pretrained(folder / "scheduler")
    index = _model_index() | (CLIP_INDEX if isinstance(unet, UNetMotionModel) else {})
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    hashes = weight_hashes(folder)
    if tiny_vae is None:  # one that the folder still holds from before is not listed, and so refused
        hashes = {name: sha256 for name, sha256 in hashes.items() if not name.startswith(f"{TINY_VAE}/")}
    (folder / RECIPE_FILE).write_text(replace(recipe, files=hashes).to_json(), encoding="utf-8")
    open_checkpoint(folder)


def publish(
    folder: Path, autoencoder: Path, teacher: Path, student: Path, tiny_autoencoder: Path | None = None
) -> None:
    """Assemble the checkpoint from the folders of the stages."""
    write_checkpoint(
        folder,
        build_recipe(),
        UNet2DConditionModel.from_pretrained(student / "unet"),
        AutoencoderKL.from_pretrained(autoencoder / "vae"),
        CLIPTextModel.from_pretrained(teacher / "text_encoder"),
        CLIPTokenizer.from_pretrained(teacher / "tokenizer"),
        tiny_vae=None if tiny_autoencoder is None else AutoencoderTiny.from_pretrained(tiny_autoencoder / TINY_VAE),
    )


def _save_model(model: ModelMixin, folder: Path) -> None:
    """Save a model without the path that it was loaded from, and without a field that makes diffusers warn."""
    model.save_pretrained(folder)
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)
    if isinstance(model, AutoencoderTiny):
        del config["block_out_channels"]  # the constructor sets this field, and warns about it as an argument
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _diffusers_scheduler(recipe: Recipe) -> DDIMScheduler:
    """Return the scheduler with which a stock pipeline samples as the recipe does, at guidance_scale = K + 1."""
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
