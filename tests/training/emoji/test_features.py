"""The feature network: exact resume, accuracy, and a Frechet distance that rises with defects."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageFilter

from tdm_runtime.model.loaded_model import LoadedModel
from tests.training.run.killed import assert_resumes, needs_font
from training.emoji.data.glyphs import load_glyphs
from training.emoji.report.features import (
    FEATURES_FILE,
    FeatureConfig,
    FeatureNetwork,
    SceneRenderer,
    corrupt,
    features_of,
    held_out_accuracy,
    load_features,
    train_features,
)
from training.emoji.report.samplers import pictures_with_k, student_pictures
from training.emoji.report.scores import Yardstick, wrong_step_counts
from training.emoji.stages.autoencoder import DecoderConfig, build_autoencoder, train_decoder
from training.run.loop import LoopConfig

GLYPHS = load_glyphs()
MAX_FILE_BYTES = 600_000
needs_weights = pytest.mark.skipif(not FEATURES_FILE.is_file(), reason="features.safetensors is not trained")


@pytest.mark.slow
@needs_font
def test_features_and_decoder_resume_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = LoopConfig(steps=4, save_every_s=0.0)
    features, decoder = FeatureConfig(loop, batch_size=4), DecoderConfig(loop, batch_size=2)
    assert_resumes(lambda folder: train_features(folder, features), tmp_path / "f", monkeypatch)
    build_autoencoder().save_pretrained(tmp_path / "a" / "vae")
    assert_resumes(lambda folder: train_decoder(folder, tmp_path / "a", decoder), tmp_path / "d", monkeypatch)
    assert_only_the_decoder_moved(tmp_path / "a" / "vae", tmp_path / "d" / "peace" / "vae")
    network = load_features(tmp_path / "f" / "peace" / FEATURES_FILE.name)
    assert network(torch.zeros(2, 3, 64, 64)).shape == (2, 128)


def assert_only_the_decoder_moved(before: Path, after: Path) -> None:
    first, second = AutoencoderKL.from_pretrained(before), AutoencoderKL.from_pretrained(after)
    assert first.config.scaling_factor == second.config.scaling_factor
    moved = {name for name, tensor in first.state_dict().items() if not torch.equal(tensor, second.state_dict()[name])}
    assert moved
    assert all(name.startswith(("decoder.", "post_quant_conv.")) for name in moved)


def test_the_error_for_a_missing_file_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="train_features"):
        load_features(tmp_path / "none.safetensors")


def test_corruption_leaves_some_pictures_unchanged_and_returns_its_degrees() -> None:
    pixels = torch.rand(64, 3, 16, 16) * 2 - 1
    corrupted, degrees = corrupt(pixels, torch.Generator().manual_seed(0))
    is_clean = (degrees == 0).all(1)
    assert 0 < is_clean.sum() < 64
    assert torch.equal(corrupted[is_clean], pixels[is_clean])
    assert not any(torch.equal(a, b) for a, b in zip(corrupted[~is_clean], pixels[~is_clean], strict=True))
    assert ((degrees >= 0) & (degrees <= 1)).all()


@needs_weights
def test_the_frechet_distance_grows_with_softness_noise_and_collapse() -> None:
    """Measured: 1.1 for drawings without jitter, 6.5 blurred by 0.7 pixels, 3.0 with noise of 10 of 255 steps."""
    yardstick = Yardstick(150, load_features())
    pictures = [yardstick.scorer.draw(scene) for scene in (*yardstick.seen, *yardstick.unseen)]

    def distance(changed: Iterable[np.ndarray]) -> float:
        return yardstick.to_drawn(features_of(yardstick.network, list(changed)))

    clean = distance(pictures)
    blurs = [distance(_blurred(picture, radius) for picture in pictures) for radius in (0.4, 0.7, 1.0)]
    noises = [distance(_noisy(picture, deviation) for picture in pictures) for deviation in (4.0, 10.0)]
    assert 1.3 * clean < blurs[0] < blurs[1] < blurs[2]
    assert 1.1 * clean < noises[0] < noises[1]
    assert distance(pictures[:75] * 4) > 10 * clean


@needs_weights
@needs_font
def test_the_network_reads_held_out_scenes_correctly() -> None:
    assert FEATURES_FILE.stat().st_size <= MAX_FILE_BYTES
    accuracy = held_out_accuracy(load_features(), SceneRenderer(0))
    assert accuracy.glyphs >= 0.6  # every glyph of a pair; 0.67 measured
    assert accuracy.background >= 0.98
    assert accuracy.layout >= 0.98


def test_with_the_right_k_the_pictures_are_those_served(model: LoadedModel) -> None:
    prompts = ["a red heart", "a cat face on a yellow background"]
    ours, served = pictures_with_k(model, prompts, 2, 2, first_seed=5), student_pictures(model, prompts, 2, 5)
    assert all(np.abs(a.astype(int) - b.astype(int)).max() <= 1 for a, b in zip(ours, served, strict=True))


def test_every_pair_of_steps_taken_and_k_received_is_measured(model: LoadedModel) -> None:
    torch.manual_seed(0)
    network = FeatureNetwork(len(GLYPHS)).eval()
    scores = wrong_step_counts(model, 2, network)
    counts = model.recipe.step_counts
    assert set(scores) == {(steps, k) for steps in counts for k in (*counts, None)}
    assert all(score.frechet >= 0 and 5 < score.psnr_db < 48.2 for score in scores.values())


def _blurred(picture: np.ndarray, radius: float) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(radius)))


def _noisy(picture: np.ndarray, deviation: float) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, deviation, picture.shape)
    return (picture + noise).clip(0, 255).astype(np.uint8)
