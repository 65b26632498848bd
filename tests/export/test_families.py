"""Stock folders of other families, end to end: folder, `tdm-recipe`, `tdm-export`, `tdm-generate`.

Their denoisers take prompts of any length, with pooled embeddings (SD 3), a mask and a guidance scale (SANA).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from PIL import Image

from export.cli import main as tdm_export
from tdm_runtime.backends.openvino import has_bf16
from tdm_runtime.checkpoint.folder import open_checkpoint
from tdm_runtime.checkpoint.manifest import Manifest, default_artifacts, load_manifest
from tdm_runtime.checkpoint.recipe import RECIPE_FILE, load_recipe
from tdm_runtime.cli import main as tdm_generate
from tdm_runtime.model.similarity import psnr_db
from tdm_runtime.recipe_cli import main as tdm_recipe
from tests.tiny_pipelines import build_pipeline

PRECISION = "bf16" if has_bf16() else "fp32"
MIN_PSNR_DB = {"bf16": 35.0, "fp32": 60.0}
STEPS = 2
SIZE = (48, 32)


def small_vae() -> AutoencoderKL:
    """Return a VAE of two levels, which is exported in half the time."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(**blocks, block_out_channels=(4, 4), norm_num_groups=2, latent_channels=4)


@pytest.fixture(scope="module", params=[pytest.param("sd3", marks=pytest.mark.slow), "sana"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stock folder of a small native size, exported."""
    path = tmp_path_factory.mktemp("families") / str(request.param)
    pipeline = build_pipeline(request.param)
    if request.param == "sd3":
        pipeline.register_modules(vae=small_vae())
    pipeline.save_pretrained(path)
    file = path / RECIPE_FILE
    assert tdm_recipe([str(path), "--steps", str(STEPS), "-o", str(file)]) == 0
    file.write_text(replace(load_recipe(path), native_sizes=(SIZE,)).to_json(), encoding="utf-8")
    prompts = path.parent / "prompts.txt"
    prompts.write_text("a red fox\n", encoding="utf-8")
    arguments = ["--backend", "openvino", "--precision", PRECISION, "--prompts", str(prompts)]
    assert tdm_export([str(path), *arguments]) == 0
    return path


@pytest.fixture
def manifest(folder: Path) -> Manifest:
    checkpoint = open_checkpoint(folder)
    return load_manifest(default_artifacts(checkpoint), checkpoint)


def picture(folder: Path, backend: str, tmp_path: Path) -> NDArray[np.uint8]:
    """Return the picture that `tdm-generate` writes."""
    file = tmp_path / f"{backend}.png"
    arguments = ["--checkpoint", str(folder), "--backend", backend, "--seed", "3", "--force", "-o", str(file)]
    assert tdm_generate(["Two cats on a hill", *arguments]) == 0
    pixels: NDArray[np.uint8] = np.asarray(Image.open(file).convert("RGB"))
    return pixels


def test_tdm_generate_makes_the_picture_of_torch(folder: Path, tmp_path: Path) -> None:
    expected = picture(folder, "torch", tmp_path)
    assert expected.shape == (SIZE[1], SIZE[0], 3) and expected.std() > 10
    for backend in ("openvino", "auto"):
        assert psnr_db(picture(folder, backend, tmp_path), expected) >= MIN_PSNR_DB[PRECISION]


def test_the_manifest_has_every_component_that_any_backend_runs(manifest: Manifest) -> None:
    (build,) = manifest.builds
    assert list(build.components) == ["encoder", "denoiser", "decoder"]
    assert all(parity.psnr_db >= MIN_PSNR_DB[PRECISION] for parity in build.pictures.values())
    for component in build.components.values():
        assert component.parity is not None and component.parity.relative_l2 < 0.05


def test_the_number_of_tokens_is_free(manifest: Manifest) -> None:
    inputs = {spec.name: spec.shape for spec in manifest.interfaces["denoiser"].inputs}
    assert inputs["prompt_embeds"][1] == "tokens"
