"""For every family and solver the engine makes the pipeline's pictures, in batches of any mixture."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tdm_runtime.engine.delivery import Delivery, Preview
from tdm_runtime.engine.engine import DiffusionEngine
from tdm_runtime.model.choice import load_model
from tdm_runtime.model.decoder import Pixels
from tdm_runtime.model.loaded_model import LoadedModel
from tdm_runtime.params import SamplingParams
from tdm_runtime.pipeline import generate
from tdm_runtime.scheduling.cost_model import CostModel, Kind
from tests.stock_checkpoints import CASES, save_checkpoint

MAX_LEVELS_APART = 2
"""Tolerance in levels of 255: sums over a batch round differently from those of one sample."""
PROMPTS = ("a fox", "two green trees on blue, seen from a long way off", "Hi", "a red apple")
SIZES = ((96, 64), (64, 96), (32, 32))
SCALES = (None, 1.0, 7.5)


class EqualCosts(CostModel):
    """Every call costs the same, so all samples that can share a call do."""

    def seconds(self, kind: Kind, size: int = 1) -> float:
        return 1e-3

    def observe(self, kind: Kind, size: int, seconds: float, now_s: float, is_calm: bool = False) -> None:
        pass

    def batch_size(self, kind: Kind, available: int) -> int:
        return available


def requests_for(model: LoadedModel) -> list[SamplingParams]:
    """Return requests that mix step counts, sizes, frames, prompts and guidance scales."""
    recipe = model.recipe
    scales = SCALES if recipe.guidance_scale is not None else (None,)
    lengths = (None,) if recipe.frames is None else (1 + recipe.frames.step, 1)
    mixed = itertools.product(SIZES, recipe.step_counts)
    return [
        SamplingParams(
            PROMPTS[n % 4],
            n,
            steps,
            width,
            height,
            guidance_scale=scales[n % len(scales)],
            frames=lengths[n // 2 % len(lengths)],
        )
        for n, ((width, height), steps) in enumerate(mixed)
    ]


def run_dry(engine: DiffusionEngine) -> None:
    for _ in range(1000):
        if not engine.num_live:
            return
        engine.step()
    pytest.fail(f"{engine.num_live} samples are still unanswered after 1000 calls")


def levels_apart(one: Pixels, other: Pixels) -> int:
    assert one.shape == other.shape
    return int(np.abs(one.astype(int) - other).max())


@pytest.mark.parametrize("name", CASES)
def test_mixed_batches_equal_the_pipeline(name: str, tmp_path: Path) -> None:
    """Pictures of three sizes join between steps, one is cancelled on its way, one is strict, one has previews."""
    model = load_model(save_checkpoint(CASES[name], tmp_path / "folder"), device="cpu")
    requests, sizes = requests_for(model), list[int]()
    engine = DiffusionEngine(model, observe_batch=lambda size, seconds: sizes.append(size), costs=EqualCosts())
    most = replace(requests[0], seed=77, num_inference_steps=model.recipe.step_counts[-1])
    previews: list[Preview] = []
    try:
        futures = engine.submit_all(requests[::2])
        cancelled = engine.submit(replace(most, seed=78))
        shown = engine.submit(
            most, Delivery(on_preview=previews.append, num_previews=3, draft=1 in model.recipe.timesteps)
        )
        engine.step()
        cancelled.cancel()
        late = engine.submit_all(requests[1::2])
        strict = engine.submit(most, Delivery(strict=True))
        run_dry(engine)
    finally:
        engine.close()
    for params, future in zip([*requests[::2], *requests[1::2]], [*futures, *late], strict=True):
        assert levels_apart(future.result(0).pixels, generate(model, params)) <= MAX_LEVELS_APART, params
    seen: list[Pixels] = []
    alone = generate(model, most, lambda step, pixels: seen.append(pixels))
    assert alone.std() > MAX_LEVELS_APART
    assert levels_apart(strict.result(0).pixels, alone) == 0
    assert levels_apart(shown.result(0).pixels, alone) <= MAX_LEVELS_APART
    for preview in previews:
        drawn = generate(model, preview.params) if preview.is_draft else seen[preview.num_steps_taken - 1]
        assert levels_apart(preview.pixels, drawn) <= MAX_LEVELS_APART
    assert len(previews) == min(3, len(seen))
    assert max(sizes) > 1
