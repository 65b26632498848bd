"""Parity: how close a build's pictures are to those of torch float32."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tdm_runtime.backends import Precision
from tdm_runtime.checkpoint.folder import Checkpoint
from tdm_runtime.checkpoint.manifest import PictureParity
from tdm_runtime.checkpoint.recipe import Recipe
from tdm_runtime.checkpoint.stock.text_precision import TextConfig
from tdm_runtime.model.decoder import Pixels
from tdm_runtime.model.load import load_with_torch
from tdm_runtime.model.loaded_model import LoadedModel
from tdm_runtime.model.similarity import psnr_db, ssim
from tdm_runtime.params import SamplingParams
from tdm_runtime.pipeline import generate

MIN_PSNR_DB = 35.0
"""Lowest PSNR against torch float32 at which "auto" may choose a build."""
QUANTISED_MIN_PSNR_DB = 30.0
"""Lowest PSNR of int8 and fp8 builds that are requested by name."""
PROMPTS = (
    "a red apple",
    "a rocket on a blue background",
    "a cat left of a dog",
    "a small penguin",
    "a pizza above a cup",
    "a butterfly on a green background",
    "a big yellow bus",
    "a purple flower in the bottom right",
)
"""Prompts compared by default. None of them calibrates int8 (`export/prompts.py`)."""
Pictures = Mapping[SamplingParams, Pixels]


@dataclass(frozen=True)
class ParityConfig:
    """Pictures to compare."""

    prompts: tuple[str, ...] = PROMPTS
    """Prompts; each gives one picture at every step count."""
    budget_s: float = 120.0
    """Seconds after which no further prompt is begun. At least one is compared."""


def compared_frames(recipe: Recipe) -> int | None:
    """Return the frames of the clips to compare: few, but enough for every kind of part of a decoder; None: pictures.

    After two steps of the frame rule every compiled program of the decoder has run.
    """
    rule = recipe.frames
    return None if rule is None else min(1 + 2 * rule.step, rule.max_frames)


def reference_pictures(
    checkpoint: Checkpoint, config: ParityConfig = ParityConfig(), text: TextConfig = TextConfig()
) -> Pictures:
    """Make the pictures with torch float32 on the CPU, prompt by prompt, so that the budget never cuts step counts."""
    recipe = checkpoint.recipe
    width, height = recipe.native_sizes[0]
    model = load_with_torch(checkpoint, device=torch.device("cpu"), text=text)
    pictures: dict[SamplingParams, Pixels] = {}
    started_s = time.monotonic()
    for seed, prompt in enumerate(config.prompts):
        if pictures and time.monotonic() - started_s > config.budget_s:
            break
        requests = [
            SamplingParams(prompt, seed, steps, width, height, frames=compared_frames(recipe))
            for steps in recipe.step_counts
        ]
        pictures |= {request: generate(model, request) for request in requests}
    return pictures


def picture_parity(reference: Pictures, model: LoadedModel) -> dict[int, PictureParity]:
    """Make the same pictures with a model and return step count K -> parity."""
    pairs: dict[int, list[tuple[Pixels, Pixels]]] = {}
    for request, expected in reference.items():
        pairs.setdefault(request.num_inference_steps, []).append((expected, generate(model, request)))
    return {steps: _parity(pairs[steps]) for steps in sorted(pairs)}


def lowest_psnr_db(pictures: Mapping[int, PictureParity]) -> float:
    """Return the lowest PSNR of all step counts."""
    return min(parity.psnr_db for parity in pictures.values())


def min_psnr_db(precision: Precision) -> float:
    """Return the lowest PSNR of a build that is requested by name."""
    return QUANTISED_MIN_PSNR_DB if precision in ("int8", "fp8") else MIN_PSNR_DB


def _parity(pairs: Sequence[tuple[Pixels, Pixels]]) -> PictureParity:
    psnrs = [psnr_db(a, b) for a, b in pairs]
    similarity = float(np.mean([ssim(a, b) for a, b in pairs]))
    return PictureParity(float(np.mean(psnrs)), min(psnrs), similarity)
