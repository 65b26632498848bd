"""Reference pictures, and a tiny FLUX.2 whose pictures depend on them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tdm_runtime.edit import GivenPicture
from tdm_runtime.model.loaded_model import LoadedModel
from tests.stock_checkpoints import CASES, stock_pipeline, write_recipe

CASE = CASES["FLUX.2 klein"]
SHARPNESS = 3
"""Factor on the weights of the attention. Random ones attend to all tokens alike, whatever their positions."""


def picture_of(width: int, height: int, seed: int = 0) -> Image.Image:
    """Return a picture of smooth waves."""
    draw = np.random.default_rng(seed)
    phases, slopes = draw.uniform(0, 6, 3), draw.uniform(-0.3, 0.3, (2, 3))
    y, x = np.mgrid[0:height, 0:width]
    waves = np.sin(slopes[0] * x[..., None] + slopes[1] * y[..., None] + phases)
    return Image.fromarray((127.5 + 120 * waves).round().astype(np.uint8))


def pictures_of(sizes: Sequence[tuple[int, int]]) -> list[Image.Image]:
    """Return a picture of each size, all of them different."""
    return [picture_of(*size, seed=n) for n, size in enumerate(sizes)]


def fitted(model: LoadedModel, pictures: Sequence[Image.Image]) -> tuple[GivenPicture, ...]:
    """Return pictures as the model reads them."""
    assert model.recipe.references is not None
    return tuple(map(model.recipe.references.fitted, pictures))


def save_attentive(folder: Path) -> Any:
    """Save a FLUX.2 [klein] with its recipe. Returns its stock pipeline."""
    pipeline = stock_pipeline(CASE)
    with torch.no_grad():
        for name, weights in pipeline.transformer.named_parameters():
            if "attn" in name:
                weights.mul_(SHARPNESS)
    pipeline.save_pretrained(folder)
    write_recipe(CASE, folder)
    return pipeline
