"""Quality gates: builds of the embedded checkpoint make the pictures of torch, at every step count.

The floors are well below the measured values (bf16 54 dB, int8 37 dB, float32 95 dB), so that only a worse build
fails, and not another machine's rounding.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tdm_runtime.backends import BackendName, Precision
from tdm_runtime.backends.openvino import has_bf16
from tdm_runtime.checkpoint.folder import open_checkpoint
from tdm_runtime.checkpoint.manifest import Build, load_manifest
from tdm_runtime.model.artifacts import BackendConfig
from tdm_runtime.model.choice import load_model
from tdm_runtime.model.decoder import Pixels
from tdm_runtime.model.loaded_model import LoadedModel
from tdm_runtime.params import SamplingParams
from tdm_runtime.pipeline import generate

Target = tuple[BackendName, Precision]
BF16, FP32, INT8, ONNX = ("openvino", "bf16"), ("openvino", "fp32"), ("openvino", "int8"), ("onnxruntime", "fp32")
TARGETS: tuple[Target, ...] = (BF16, FP32, INT8, ONNX)
PSNR_FLOORS_DB = {BF16: 35.0, FP32: 60.0, INT8: 30.0, ONNX: 60.0}
SSIM_FLOORS = {BF16: 0.99, FP32: 0.9999, INT8: 0.97, ONNX: 0.9999}
RELATIVE_L2_LIMITS = {BF16: 0.03, FP32: 1e-3, INT8: 0.15, ONNX: 1e-3}
"""Largest allowed relative L2 error of each component's output."""
MAX_LEVELS_APART = {BF16: 8, FP32: 1, INT8: 96, ONNX: 1}
"""Largest allowed difference of a decoder's pixel on noise, in levels of 255. int8 is not calibrated for noise."""
PROMPT = "a red apple above a yellow banana on a blue background"
SEED = 21


def runs_here(target: Target) -> bool:
    return target != BF16 or has_bf16()


@pytest.fixture(params=TARGETS, ids=" ".join)
def target(request: pytest.FixtureRequest) -> Target:
    wanted: Target = request.param
    if not runs_here(wanted):
        pytest.skip("this CPU has no bfloat16 arithmetic")
    return wanted


@pytest.fixture
def build(artifacts: Path, checkpoint_folder: Path, target: Target) -> Build:
    found = load_manifest(artifacts, open_checkpoint(checkpoint_folder)).find(*target)
    assert found is not None
    return found


def test_pictures_are_close_to_torch_at_every_step_count(build: Build, target: Target, model: LoadedModel) -> None:
    assert tuple(build.pictures) == model.recipe.step_counts == (1, 2, 3, 4)
    for parity in build.pictures.values():
        assert parity.psnr_db >= PSNR_FLOORS_DB[target]
        assert parity.ssim >= SSIM_FLOORS[target]


def test_the_output_of_every_component_is_close_to_torch(build: Build, target: Target, model: LoadedModel) -> None:
    assert {"text_encoder", "denoiser", "decoder"} <= set(build.components)
    assert ("tiny_decoder" in build.components) == ("tiny" in model.decoders)
    for name, component in build.components.items():
        assert component.parity is not None
        assert component.parity.relative_l2 <= RELATIVE_L2_LIMITS[target]
        if name.endswith("decoder"):
            assert component.parity.max_abs <= MAX_LEVELS_APART[target]


def mean_square_error(a: Pixels, b: Pixels) -> float:
    return float(np.square(a.astype(np.float64) - b).mean())


def test_the_manifest_predicts_the_parity_of_another_picture(
    model: LoadedModel, artifacts: Path, checkpoint_folder: Path, build: Build, target: Target
) -> None:
    """The prompt is not one of the prompts that `tdm-export` calibrates or verifies with."""
    built = load_model(checkpoint_folder, BackendConfig(*target, artifacts=artifacts))
    assert built.backend == build.name
    assert built.parity == build.pictures
    width, height = model.recipe.native_sizes[0]
    for steps in model.recipe.step_counts:
        params = SamplingParams(PROMPT, SEED, steps, width, height)
        error = mean_square_error(generate(model, params), generate(built, params))
        assert error <= 255.0**2 / 10 ** (PSNR_FLOORS_DB[target] / 10)
        # The mean and the minimum over the verified prompts predict the PSNR of another prompt.
        spread_db = build.pictures[steps].psnr_db - build.pictures[steps].min_psnr_db
        expected_db = build.pictures[steps].psnr_db
        if error > 0:
            # Above 80 dB single levels differ, of which a few prompts may have none.
            psnr_db, expected_db = (min(db, 80.0) for db in (10 * np.log10(255.0**2 / error), expected_db))
            assert psnr_db == pytest.approx(expected_db, abs=3 + 3 * spread_db)


def test_the_int8_build_really_runs_in_int8(model: LoadedModel, artifacts: Path, checkpoint_folder: Path) -> None:
    """Its pictures differ from those of the unquantised build."""
    width, height = model.recipe.native_sizes[0]
    pictures = {
        precision: generate(
            load_model(checkpoint_folder, BackendConfig("openvino", precision, artifacts=artifacts)),
            SamplingParams(PROMPT, SEED, 1, width, height),
        )
        for precision in ("fp32", "int8")
    }
    assert mean_square_error(pictures["fp32"], pictures["int8"]) > 0.5
