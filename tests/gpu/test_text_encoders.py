"""Text encoders on the CPU or on a CUDA device condition a denoiser on a CUDA device."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tdm_runtime.checkpoint.stock.text_precision import TextConfig, TextPrecision
from tdm_runtime.errors import BackendError
from tdm_runtime.model.artifacts import BackendConfig
from tdm_runtime.model.choice import load_model
from tdm_runtime.params import SamplingParams
from tdm_runtime.pipeline import generate
from tests.stock_checkpoints import CASES, save_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LEVELS_APART: dict[TextPrecision, int] = {"fp32": 3, "bf16": 20, "fp8": 60}
"""Allowed difference in levels of 255 from the picture of the CPU in float32."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(CASES["SD 3.5 Turbo"], tmp_path_factory.mktemp("sd3") / "folder")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("precision", LEVELS_APART)
def test_pictures_are_those_of_the_cpu(folder: Path, device: str, precision: TextPrecision) -> None:
    params = SamplingParams("A red Fox", 7, 4, 96, 64)
    expected = generate(load_model(folder, device="cpu"), params).astype(int)
    model = load_model(folder, BackendConfig(text=TextConfig(precision, device)), device="cuda")
    assert model.text_encoder.encode("a fox").conditioning.prompt_embeds.device.type == "cuda"
    assert np.abs(expected - generate(model, params)).max() <= LEVELS_APART[precision]


def test_int8_needs_the_cpu(folder: Path) -> None:
    with pytest.raises(BackendError, match="run on the CPU only"):
        load_model(folder, BackendConfig(text=TextConfig("int8")), device="cuda")
    load_model(folder, BackendConfig(text=TextConfig("int8", "cpu")), device="cuda")
