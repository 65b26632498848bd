"""On a CUDA device, the torch backend makes the same pictures as on the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tdm_runtime.engine.engine import DiffusionEngine
from tdm_runtime.model.choice import load_model
from tdm_runtime.model.loaded_model import LoadedModel
from tdm_runtime.params import SamplingParams
from tdm_runtime.pipeline import generate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE_TOLERANCE = 3
"""Allowed difference in levels of 255 between the kernels of two devices."""


@pytest.fixture(scope="module")
def cuda_model(checkpoint_folder: Path) -> LoadedModel:
    return load_model(checkpoint_folder, device="cuda")


def test_the_engine_on_cuda_equals_the_reference_on_the_cpu(model: LoadedModel, cuda_model: LoadedModel) -> None:
    params = [SamplingParams("a red heart on a blue background", seed, 1 + seed % 4, 64, 64) for seed in range(8)]
    with DiffusionEngine(cuda_model) as engine:
        pictures = [future.result().pixels for future in engine.submit_all(params)]
    for request, picture in zip(params, pictures, strict=True):
        difference = np.abs(picture.astype(int) - generate(model, request))
        assert difference.max() <= DEVICE_TOLERANCE
