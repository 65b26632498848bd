"""The engine makes edits as the reference loop does, in calls that they share with other pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from tdm_runtime.backends import Backend
from tdm_runtime.edit import Edit
from tdm_runtime.engine.delivery import Delivery
from tdm_runtime.engine.engine import DiffusionEngine, EngineConfig
from tdm_runtime.engine.sample import Picture
from tdm_runtime.errors import InvalidRequestError
from tdm_runtime.model.choice import load_model
from tdm_runtime.model.encoder import PictureEncoder
from tdm_runtime.model.loaded_model import LoadedModel
from tdm_runtime.params import SamplingParams
from tdm_runtime.pipeline import generate

TIMEOUT_S = 60.0
MAX_LEVELS_APART = 2


class Counting:
    """Backend that counts the samples of its calls."""

    def __init__(self, backend: Backend) -> None:
        self.device, self.is_batch_invariant = backend.device, True
        self.sizes: list[int] = []
        self._backend = backend

    def __call__(self, *inputs: Tensor) -> Tensor:
        self.sizes.append(len(inputs[0]))
        return self._backend(*inputs)


@pytest.fixture(scope="module")
def tiny_model(tiny_checkpoint: Path) -> LoadedModel:
    """A model with random weights at minimal size, which makes pictures of 16x16 and 24x16."""
    return load_model(tiny_checkpoint, device="cpu")


@pytest.fixture
def counted(tiny_model: LoadedModel) -> tuple[LoadedModel, Counting, Counting]:
    """The tiny model, with counts of the calls of its encoder and of its denoiser."""
    assert tiny_model.encoder is not None
    encoder, denoiser = Counting(tiny_model.encoder.backend), Counting(tiny_model.denoiser)
    return replace(tiny_model, encoder=PictureEncoder(encoder), denoiser=denoiser), encoder, denoiser


def picture(seed: int, width: int = 16, height: int = 16) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def mask() -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    found = np.zeros((16, 16), np.uint8)
    found[:, 8:] = 255
    return found


def requests(model: LoadedModel) -> Iterator[SamplingParams]:
    """Yield pictures and edits of every kind."""
    most = model.recipe.step_counts[-1]
    for seed in range(3):
        yield SamplingParams("a fox", seed, most, 16, 16)
        for strength in (0.3, 0.6, 1.0):
            yield SamplingParams("a fox", seed, most, 16, 16, edit=Edit(picture(seed), strength))
        yield SamplingParams("a hill", seed, most, 16, 16, edit=Edit(picture(seed), 0.6, mask()))
        yield SamplingParams("a hill", seed, 1, 16, 16, edit=Edit(picture(9), 0.2, mask()))


def results(futures: list[Future[Picture]]) -> list[Picture]:
    return [future.result(TIMEOUT_S) for future in futures]


def test_edits_and_pictures_of_one_batch_equal_the_reference_loop(
    counted: tuple[LoadedModel, Counting, Counting],
) -> None:
    model, _, denoiser = counted
    asked = list(requests(model))
    expected = [generate(model, params) for params in asked]
    denoiser.sizes.clear()
    engine = DiffusionEngine(model)
    futures = [engine.submit(params) for params in asked]  # before it starts, so that they meet
    with engine:
        made = results(futures)
    for params, one, wanted in zip(asked, made, expected, strict=True):
        assert np.abs(one.pixels.astype(int) - wanted).max() <= MAX_LEVELS_APART, params
        assert len(one.timings.steps_ms) == params.num_steps
    assert sum(denoiser.sizes) == sum(params.num_steps for params in asked)
    assert max(denoiser.sizes) > len(asked) / 2, "they share calls, whatever row they start at"


def test_a_picture_is_encoded_once_for_all_edits_of_it(counted: tuple[LoadedModel, Counting, Counting]) -> None:
    model, encoder, _ = counted
    edits = [
        Edit(picture(n % 2), strength, mask() if n == 4 else None) for n, strength in enumerate([0.3, 0.5, 0.7] * 2)
    ]
    engine = DiffusionEngine(model)
    futures = [engine.submit(SamplingParams("a fox", n, 2, 16, 16, edit=edit)) for n, edit in enumerate(edits)]
    with engine:
        made = results(futures)
        assert sum(encoder.sizes) == 2
        again = engine.submit(SamplingParams("a cat", 0, 2, 16, 16, edit=edits[0])).result(TIMEOUT_S)
    assert sum(encoder.sizes) == 2 and again.timings.image_ms == 0.0
    assert any(one.timings.image_ms > 0 for one in made)
    for one in (*made, again):
        timings = one.timings
        assert timings.queue_ms == pytest.approx(sum(timings.waits_ms))
        assert len(timings.waits_ms) == 2 + len(timings.steps_ms)


@pytest.mark.parametrize("strength", [0.25, 0.5, 1.0])
def test_an_open_step_count_takes_the_most_that_the_strength_leaves(tiny_model: LoadedModel, strength: float) -> None:
    most = tiny_model.recipe.step_counts[-1]
    params = SamplingParams("a fox", 0, most, 16, 16, edit=Edit(picture(0), strength))
    with DiffusionEngine(tiny_model) as engine:
        made = engine.submit(params, Delivery(latency_budget_ms=6e4, min_inference_steps=1)).result(TIMEOUT_S)
    assert made.params.num_inference_steps == most
    assert np.array_equal(made.pixels, generate(tiny_model, params))


def test_equal_edits_come_from_the_result_cache_and_others_do_not(tiny_model: LoadedModel) -> None:
    def params(seed: int, strength: float) -> SamplingParams:
        return SamplingParams("a fox", 0, 2, 16, 16, edit=Edit(picture(seed), strength))

    with DiffusionEngine(tiny_model, EngineConfig(result_cache_bytes=2**20)) as engine:
        seen = Counter(
            engine.submit(params(*each)).result(TIMEOUT_S).is_cached
            for each in [(0, 0.5), (0, 0.5), (1, 0.5), (0, 0.9)]
        )
    assert seen == {False: 3, True: 1}


def test_previews_of_a_masked_edit_keep_the_given_picture(tiny_model: LoadedModel) -> None:
    previews = []
    params = SamplingParams("a fox", 0, 2, 16, 16, edit=Edit(picture(0), 1.0, mask()))
    with DiffusionEngine(tiny_model) as engine:
        engine.submit(params, Delivery(on_preview=previews.append, num_previews=1)).result(TIMEOUT_S)
    (preview,) = previews
    assert np.array_equal(preview.pixels[:, :6], picture(0)[:, :6])
    assert not np.array_equal(preview.pixels[:, 8:], picture(0)[:, 8:])


def test_a_picture_in_another_size_is_refused(tiny_model: LoadedModel) -> None:
    params = SamplingParams("a fox", 0, 2, 24, 16, edit=Edit(picture(0), 0.5))
    with DiffusionEngine(tiny_model) as engine, pytest.raises(InvalidRequestError, match="the given picture is 16x16"):
        engine.submit(params)
