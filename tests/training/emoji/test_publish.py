"""A published checkpoint gives the same pictures in stock diffusers pipelines and in the runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from tdm_runtime.checkpoint.file_hashes import file_sha256
from tdm_runtime.checkpoint.folder import open_checkpoint
from tdm_runtime.model.loaded_model import LoadedModel
from tdm_runtime.params import SamplingParams
from tdm_runtime.pipeline import generate
from tdm_runtime.sampling.noise import initial_noise
from training.emoji.stages.student import EMOJI, build_recipe

MAX_FOLDER_BYTES = 25 * 10**6


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_stock_pipeline_makes_the_same_picture(model: LoadedModel, checkpoint_folder: Path, steps: int) -> None:
    """Such pipelines embed K as guidance_scale = K + 1. (K = 3 is left out: their DDIM rounds its timesteps.)"""
    pipeline = StableDiffusionPipeline.from_pretrained(checkpoint_folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    stock = pipeline(
        "a red heart on a yellow background",
        num_inference_steps=steps,
        guidance_scale=steps + 1.0,
        latents=initial_noise(5, (1, 4, 16, 16)),
        output_type="np",
    ).images[0]
    ours = generate(model, SamplingParams("a red heart on a yellow background", 5, steps, 64, 64))
    assert np.abs(stock * 255.0 - ours).max() <= 1.0


def test_the_embedded_checkpoint_is_small_and_its_hashes_match(checkpoint_folder: Path) -> None:
    files = [file for file in checkpoint_folder.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < MAX_FOLDER_BYTES
    recipe = open_checkpoint(checkpoint_folder).recipe
    assert recipe.step_counts == EMOJI.step_counts
    assert all(file_sha256(checkpoint_folder / name) == sha for name, sha in recipe.files.items())


def test_training_and_serving_have_the_same_timesteps_schedule_and_solver(checkpoint_folder: Path) -> None:
    served, trained = open_checkpoint(checkpoint_folder).recipe, build_recipe()
    assert served.timesteps == trained.timesteps
    assert served.noise_schedule == trained.noise_schedule
    assert (served.solver, served.prediction_type) == (trained.solver, trained.prediction_type)
