"""The embedded checkpoint draws what its prompts say, at every step count.

The floors are below the values that `tdm-train score` measured (checkpoints/tdm-emoji/README.md). So only a worse
checkpoint or a broken sampler fails, and not the rounding of another machine.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from tdm_runtime.model.loaded_model import LoadedModel
from tdm_runtime.model.similarity import psnr_db
from tdm_runtime.params import SamplingParams
from tdm_runtime.pipeline import generate
from tdm_runtime.sampling.noise import initial_noise
from training.emoji.data.glyphs import load_glyphs
from training.emoji.data.scenes import Scene, caption
from training.emoji.report.samplers import pictures_with_k, student_pictures
from training.emoji.report.score import Score, Scorer, scoring_scenes
from training.emoji.report.tiny_report import Autoencoders, load_autoencoders, student_latents
from training.emoji.stages.autoencoder import to_pixels
from training.emoji.stages.tiny_autoencoder import StudentSampler

PROMPTS = 48
GLYPHS_FLOOR = 0.93
BACKGROUND_FLOOR = 0.95
K_EFFECT_FLOOR = 0.05
"""Root mean square of a difference of model outputs, whose standard deviation is about 1."""
TINY_DECODER_FLOOR_DB = 28.5
TINY_ENCODER_CEILING = 0.07
"""Root mean square of an error of latents, whose standard deviation is about 1. The measured error is 0.045."""


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return Scorer()


@pytest.fixture(scope="module")
def score_of(model: LoadedModel, scorer: Scorer) -> Callable[[int, bool], Score]:
    """Step count and whether the scenes were held out -> score of the served pictures. Each is made once."""

    @cache
    def scored(steps: int, held_out: bool) -> Score:
        scenes = scoring_scenes(PROMPTS, held_out=held_out)
        return scorer.score(student_pictures(model, [caption(scene) for scene in scenes], steps), scenes)

    return scored


@pytest.mark.parametrize(
    ("steps", "held_out"),
    [
        *(pytest.param(steps, False, id=f"{steps}-trained scenes") for steps in (1, 2, 3, 4)),
        *(pytest.param(steps, True, id=f"{steps}-held-out scenes") for steps in (1, 4)),
        *(pytest.param(steps, True, id=f"{steps}-held-out scenes", marks=pytest.mark.slow) for steps in (2, 3)),
    ],
)
def test_pictures_show_the_glyphs_and_background_of_their_captions(
    score_of: Callable[[int, bool], Score], steps: int, held_out: bool
) -> None:
    score = score_of(steps, held_out)
    assert score.glyphs >= GLYPHS_FLOOR
    assert score.background >= BACKGROUND_FLOOR


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("prompt", "hue_degrees"),
    [
        ("a red heart", 0),
        ("a yellow heart", 50),
        ("a green heart", 110),
        ("a blue heart", 215),
        ("a purple heart", 285),
    ],
)
def test_a_heart_has_the_colour_of_its_prompt(model: LoadedModel, steps: int, prompt: str, hue_degrees: int) -> None:
    picture = generate(model, SamplingParams(prompt, 3, steps, 64, 64))
    centre = picture[24:40, 24:40].reshape(-1, 3) / 255.0
    hue, saturation, _ = colorsys.rgb_to_hsv(*np.median(centre, axis=0))
    distance = abs((360 * hue - hue_degrees + 180) % 360 - 180)
    assert distance < 30
    assert saturation > 0.4


def test_a_picture_composes_two_glyphs_and_a_background(model: LoadedModel, scorer: Scorer) -> None:
    glyphs = {glyph.name: glyph for glyph in load_glyphs()}
    scene = Scene((glyphs["red heart"], glyphs["butterfly"]), "blue")
    pictures = [
        generate(model, SamplingParams("a red heart left of a butterfly on a blue background", seed, 4, 64, 64))
        for seed in range(8)
    ]
    assert scorer.score(pictures, [scene] * 8).adherence >= 0.75


@torch.inference_mode()
def test_the_model_output_depends_on_k(model: LoadedModel) -> None:
    """From the same noise, the first step differs between step counts (TDM, sec. 3.2)."""
    counts = list(model.recipe.step_counts)
    embeds = model.text_encoder.encode("a red heart").conditioning.prompt_embeds
    prompt_embeds = embeds.expand(len(counts), -1, -1)
    noise = initial_noise(0, (4, 16, 16)).expand(len(counts), -1, -1, -1)
    outputs = model.denoiser(noise, torch.full((len(counts),), 999.0), torch.tensor(counts), prompt_embeds)
    for first, second in pairwise(outputs):
        assert (first - second).square().mean().sqrt().item() > K_EFFECT_FLOOR


@pytest.mark.parametrize(("steps", "k", "loss_db"), [(1, 4, 1.5), (1, None, 0.5), (4, 1, 0.4)])
def test_a_wrong_or_missing_k_lowers_the_fidelity(
    model: LoadedModel,
    scorer: Scorer,
    score_of: Callable[[int, bool], Score],
    steps: int,
    k: int | None,
    loss_db: float,
) -> None:
    """Fidelity is the PSNR against the drawing that the caption describes."""
    scenes = scoring_scenes(PROMPTS)
    pictures = pictures_with_k(model, [caption(scene) for scene in scenes], steps, k)
    assert scorer.score(pictures, scenes).psnr_db < score_of(steps, False).psnr_db - loss_db


def test_another_prompt_or_seed_makes_another_picture(model: LoadedModel) -> None:
    first, other_words, other_noise = (
        generate(model, SamplingParams(prompt, seed, 4, 64, 64)).astype(int)
        for prompt, seed in (("a cat", 1), ("a pizza", 1), ("a cat", 2))
    )
    assert np.abs(first - other_words).mean() > 10
    assert np.abs(first - other_noise).mean() > 0.1


# -- the tiny autoencoder --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def autoencoders(checkpoint_folder: Path) -> Autoencoders:
    return load_autoencoders(checkpoint_folder)


def test_the_tiny_decoder_makes_nearly_the_pictures_of_the_full_one(
    autoencoders: Autoencoders, checkpoint_folder: Path
) -> None:
    """Measured: 32.2 to 32.9 dB for pictures of every K, 30.6 to 31.8 dB for estimates after the first step."""
    scenes = [*scoring_scenes(PROMPTS // 6), *scoring_scenes(PROMPTS // 6, held_out=True)]
    student = StudentSampler(checkpoint_folder, checkpoint_folder)
    for name, latents in student_latents(student, [caption(scene) for scene in scenes]).items():
        tiny, full = autoencoders.decode_tiny(latents), autoencoders.decode(latents)
        assert psnr_db(tiny.numpy(), full.numpy(), peak=2.0) >= TINY_DECODER_FLOOR_DB, name


def test_the_tiny_encoder_makes_nearly_the_latents_of_the_full_one(autoencoders: Autoencoders, scorer: Scorer) -> None:
    pixels = to_pixels(np.stack([scorer.draw(scene) for scene in scoring_scenes(PROMPTS, held_out=True)]))
    error = autoencoders.encode_tiny(pixels) - autoencoders.encode(pixels)
    assert error.square().mean().sqrt().item() < TINY_ENCODER_CEILING
