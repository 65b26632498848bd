"""The tiny autoencoder: exact resume, training pairs, publishing and loading."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline
from transformers import CLIPTokenizer

from tdm_runtime.checkpoint.file_hashes import file_sha256
from tdm_runtime.checkpoint.folder import open_checkpoint
from tdm_runtime.checkpoint.folder_files import DIFFUSION_WEIGHTS, TINY_VAE
from tdm_runtime.errors import CheckpointError, RecipeError
from tdm_runtime.model.loaded_model import LoadedModel
from tdm_runtime.model.similarity import psnr_db
from tdm_runtime.params import SamplingParams
from tdm_runtime.pipeline import generate
from tests.training.run.killed import assert_resumes, needs_font
from training.emoji.data.text import build_text_encoder
from training.emoji.stages.autoencoder import build_autoencoder, to_pixels
from training.emoji.stages.publish import publish
from training.emoji.stages.teacher import build_unet, save_teacher
from training.emoji.stages.tiny_autoencoder import (
    PAIRS_FILE,
    StudentSampler,
    TinyAutoencoderConfig,
    build_tiny_autoencoder,
    decode,
    from_bytes,
    load_pairs,
    to_bytes,
    train_tiny_autoencoder,
)
from training.run.loop import LoopConfig

CONFIG = TinyAutoencoderConfig(LoopConfig(steps=3, save_every_s=0.0), batch_size=2, drawings=6, captions=1, held_out=2)

TINY_FILES = (f"{TINY_VAE}/{DIFFUSION_WEIGHTS}", f"{TINY_VAE}/config.json")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tokenizer: CLIPTokenizer) -> Path:
    """Folders of all stages, with untrained parts in the size of the embedded model."""
    run = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    save_teacher(run / "teacher", build_unet(), build_text_encoder(tokenizer), tokenizer)
    build_unet().save_pretrained(run / "student" / "unet")
    build_autoencoder().save_pretrained(run / "decoder" / "vae")
    build_tiny_autoencoder().save_pretrained(run / "tiny-autoencoder" / TINY_VAE)
    return run


@pytest.fixture
def published(run: Path, tmp_path: Path) -> Path:
    """A checkpoint with a tiny autoencoder."""
    folder = tmp_path / "checkpoint"
    publish(folder, run / "decoder", run / "teacher", run / "student", run / "tiny-autoencoder")
    return folder


# -- training --------------------------------------------------------------------------------------


@needs_font
def test_training_resumes_exactly_and_changes_encoder_and_decoder(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(folder: Path) -> None:
        train_tiny_autoencoder(folder, run / "decoder", run / "teacher", run / "student", CONFIG)

    assert_resumes(train, tmp_path, monkeypatch)
    torch.manual_seed(CONFIG.loop.seed)
    before = build_tiny_autoencoder().state_dict()
    after = AutoencoderTiny.from_pretrained(tmp_path / "peace" / TINY_VAE).state_dict()
    assert not any(torch.equal(before[name], after[name]) for name in before)


@needs_font
def test_pairs_with_other_counts_are_rejected(run: Path, tmp_path: Path) -> None:
    vae, student = build_autoencoder().eval(), StudentSampler(run / "teacher", run / "student")
    pairs = load_pairs(tmp_path / PAIRS_FILE, vae, student, CONFIG)
    assert len(pairs.latents) == len(pairs.pictures) == 6 + 1 + 2 + 3 + 4
    assert torch.equal(pairs.latents, load_pairs(tmp_path / PAIRS_FILE, vae, student, CONFIG).latents)
    with pytest.raises(ValueError, match=r"pairs.safetensors holds 6 drawings and 16 latents.*remove it"):
        load_pairs(tmp_path / PAIRS_FILE, vae, student, TinyAutoencoderConfig(CONFIG.loop, drawings=6, captions=3))


@pytest.mark.parametrize("steps", [1, 4])
def test_the_last_estimate_decodes_to_the_served_picture(
    model: LoadedModel, checkpoint_folder: Path, steps: int
) -> None:
    student = StudentSampler(checkpoint_folder, checkpoint_folder)
    prompts = ["a red heart", "a cat face on a yellow background"]
    estimates = student.estimates(prompts, steps, first_seed=5)
    assert estimates.shape == (steps, 2, 4, 16, 16)
    pixels = decode(open_checkpoint(checkpoint_folder).load_vae(), estimates[-1])
    for n, prompt in enumerate(prompts):
        served = generate(model, SamplingParams(prompt, 5 + n, steps, 64, 64))
        likeness_db = psnr_db(pixels[n : n + 1].numpy(), to_pixels(served[None]).numpy(), peak=2.0)
        assert likeness_db > 45  # bf16 against fp32; 54 measured


def test_bytes_to_pixels_and_back_changes_nothing() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(to_bytes(from_bytes(levels)), levels)


# -- the checkpoint --------------------------------------------------------------------------------


def test_a_checkpoint_can_be_published_with_a_tiny_autoencoder(published: Path, run: Path) -> None:
    checkpoint = open_checkpoint(published)
    assert checkpoint.has_tiny_vae
    assert checkpoint.recipe.files[TINY_FILES[0]] == file_sha256(published / TINY_FILES[0])
    tiny = checkpoint.load_tiny_vae()
    assert tiny.config.scaling_factor == 1.0
    assert tiny.config.block_out_channels == [32, 32, 32]  # not in the file; its length gives the downscale
    assert tiny.dtype == torch.float32
    assert not tiny.training
    trained = AutoencoderTiny.from_pretrained(run / "tiny-autoencoder" / TINY_VAE)
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(tiny.decode(latents).sample, trained.decode(latents).sample, atol=0.02, rtol=0.0)


def test_a_checkpoint_can_be_published_without_a_tiny_autoencoder(run: Path, tmp_path: Path) -> None:
    publish(tmp_path / "checkpoint", run / "decoder", run / "teacher", run / "student")
    checkpoint = open_checkpoint(tmp_path / "checkpoint")
    assert not checkpoint.has_tiny_vae
    with pytest.raises(CheckpointError, match=r"no tiny_vae/; decode with the full autoencoder, or train a tiny one"):
        checkpoint.load_tiny_vae()


def test_published_configs_hold_no_paths_of_the_run(published: Path, run: Path) -> None:
    for config in published.rglob("config.json"):
        assert str(run) not in config.read_text(encoding="utf-8")


def test_stock_pipelines_read_the_checkpoint_with_either_autoencoder(published: Path) -> None:
    stock = StableDiffusionPipeline.from_pretrained(published)
    swapped = StableDiffusionPipeline.from_pretrained(
        published, vae=AutoencoderTiny.from_pretrained(published, subfolder=TINY_VAE)
    )
    assert type(stock.vae).__name__ == "AutoencoderKL"
    assert type(swapped.vae).__name__ == "AutoencoderTiny"
    assert stock.vae_scale_factor == swapped.vae_scale_factor == 4


@pytest.mark.parametrize("name", TINY_FILES)
def test_a_tiny_autoencoder_with_a_missing_file_is_rejected(published: Path, name: str) -> None:
    (published / name).unlink()
    with pytest.raises(CheckpointError, match=f"lacks {name}"):
        open_checkpoint(published)


def test_a_tiny_autoencoder_that_the_recipe_does_not_list_is_rejected(published: Path, run: Path) -> None:
    """Publish without a tiny autoencoder into a folder that still holds an old one."""
    with pytest.raises(RecipeError, match=rf"no sha256 for {TINY_FILES[0]}.*remove what does not belong"):
        publish(published, run / "decoder", run / "teacher", run / "student")
    shutil.rmtree(published / TINY_VAE)
    assert not open_checkpoint(published).has_tiny_vae


def test_tiny_weights_of_another_shape_are_rejected(published: Path) -> None:
    file = published / TINY_VAE / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**config, "num_decoder_blocks": [4, 2, 0]}), encoding="utf-8")
    with pytest.raises(CheckpointError, match="tiny_vae"):
        open_checkpoint(published).load_tiny_vae()
