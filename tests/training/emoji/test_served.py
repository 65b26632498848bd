"""The runtime serves the same picture as the trainer's sampler makes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import CLIPTokenizer

from tdm_runtime.model.choice import load_model
from tdm_runtime.model.loaded_model import LoadedModel
from tdm_runtime.params import SamplingParams
from tdm_runtime.pipeline import generate
from tdm_runtime.sampling.noise import initial_noise
from training.emoji.data.text import build_text_encoder
from training.emoji.stages.autoencoder import build_autoencoder
from training.emoji.stages.publish import publish
from training.emoji.stages.student import EMOJI, ScenePrompts, build_distiller
from training.emoji.stages.teacher import build_unet, save_teacher
from training.pretrained.student_files import save_denoiser
from training.run.distill import Distiller
from training.run.loop import step_generator

PROMPT, SEED = "a red heart on a blue background", 11
ROUNDING = 3
"""Greatest difference that float16 weights may cause, in levels of 255."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tokenizer: CLIPTokenizer) -> tuple[Distiller, LoadedModel]:
    """A distiller after three iterations from a random teacher, and the model that the runtime loads from it."""
    run = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    save_teacher(run / "teacher", build_unet(), build_text_encoder(tokenizer), tokenizer)
    build_autoencoder().save_pretrained(run / "decoder" / "vae")
    distiller = build_distiller(replace(EMOJI, batch_size=2, steps=3, precision="fp32"), run / "teacher")
    for step in range(3):
        distiller.train_step(step, step_generator(0, "served", step))
    save_denoiser(distiller.average, run / "student")  # type: ignore[arg-type]
    publish(run / "checkpoint", run / "decoder", run / "teacher", run / "student")
    return distiller, load_model(run / "checkpoint")


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_the_served_picture_is_the_trainers(trained: tuple[Distiller, LoadedModel], steps: int) -> None:
    distiller, model = trained
    prompts = distiller.run.prompts
    assert isinstance(prompts, ScenePrompts)
    latents = distiller.sample(initial_noise(SEED, (1, 4, 16, 16)), steps, prompts.encode([PROMPT]))
    expected = model.decoders["full"].decode(latents)[0]
    served = generate(model, SamplingParams(PROMPT, SEED, steps, 64, 64))
    assert np.abs(served.astype(int) - expected.astype(int)).max() <= ROUNDING


def test_three_iterations_change_the_student(trained: tuple[Distiller, LoadedModel]) -> None:
    distiller, _ = trained
    prompts = distiller.run.prompts
    noise = initial_noise(SEED, (1, 4, 16, 16))
    with torch.no_grad():
        x, timesteps = noise, torch.tensor([999.0])
        teacher = distiller.roles.teacher(x, timesteps, prompts.empty(), None)
        student = distiller.roles.student(x, timesteps, prompts.empty(), torch.tensor([1]))
    assert not torch.equal(teacher, student)
