"""Delivery options of the engine: budgets, "auto" step counts, strict bits, previews, drafts, repeats."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tdm_runtime.checkpoint.folder import DEFAULT_CHECKPOINT
from tdm_runtime.engine.delivery import Delivery, Preview
from tdm_runtime.engine.engine import DiffusionEngine, EngineConfig
from tdm_runtime.engine.intake import call_kind
from tdm_runtime.engine.sample import Picture
from tdm_runtime.engine.warm_up import warm_up
from tdm_runtime.errors import DeadlineError, GenerationError, InvalidRequestError
from tdm_runtime.model.artifacts import BackendConfig
from tdm_runtime.model.choice import load_model
from tdm_runtime.model.loaded_model import LoadedModel
from tdm_runtime.params import SamplingParams
from tdm_runtime.pipeline import generate
from tdm_runtime.scheduling.cost_model import CostModel, Kind

TIMEOUT_S = 60.0
MAX_LEVELS_APART = 2
PARAMS = SamplingParams("a red apple", 1, 4, 16, 16)


class KnownCosts(CostModel):
    """A step takes a second and a decode half of one, for any number of samples; nothing is learned."""

    def seconds(self, kind: Kind, size: int = 1) -> float:
        return {"denoise": 1.0, "text": 0.0}.get(kind.stage, 0.5)

    def observe(self, kind: Kind, size: int, seconds: float, now_s: float, is_calm: bool = False) -> None:
        pass

    def batch_size(self, kind: Kind, available: int) -> int:
        return available


@pytest.fixture(scope="module")
def tiny_model(tiny_checkpoint: Path) -> LoadedModel:
    return load_model(tiny_checkpoint, device="cpu")


@pytest.fixture
def engine(tiny_model: LoadedModel) -> Iterator[DiffusionEngine]:
    """An engine that was not started; the test calls `step` itself."""
    engine = DiffusionEngine(tiny_model, costs=KnownCosts())
    yield engine
    engine.close()


def run_dry(engine: DiffusionEngine) -> None:
    for _ in range(1000):
        if not engine.num_live:
            return
        engine.step()
    pytest.fail(f"{engine.num_live} samples are still unanswered after 1000 calls")


# -- budgets and step counts -----------------------------------------------------------------------


@pytest.mark.parametrize(("budget_ms", "steps"), [(1600, 1), (2600, 2), (4600, 4), (60_000, 4)])
def test_auto_takes_the_most_steps_that_the_budget_allows(
    engine: DiffusionEngine, tiny_model: LoadedModel, budget_ms: float, steps: int
) -> None:
    future = engine.submit(PARAMS, Delivery(latency_budget_ms=budget_ms, min_inference_steps=1))
    run_dry(engine)
    picture = future.result(TIMEOUT_S)
    assert picture.params == replace(PARAMS, num_inference_steps=steps)
    assert np.abs(picture.pixels.astype(int) - generate(tiny_model, picture.params)).max() <= MAX_LEVELS_APART
    assert picture.predicted_ms == pytest.approx(1e3 * steps + 500, abs=200)


def test_auto_takes_fewer_steps_beside_other_promises(engine: DiffusionEngine) -> None:
    delivery = Delivery(latency_budget_ms=6000, min_inference_steps=1)
    alone = {replace(PARAMS, seed=n, width=24 if n % 2 else 16) for n in range(4)}
    futures = engine.submit_all(sorted(alone, key=lambda params: params.seed), delivery)
    run_dry(engine)
    taken = [future.result(TIMEOUT_S).params.num_inference_steps for future in futures]
    assert min(taken) < 4, "four pictures of two shapes do not all fit with four steps into six seconds"
    assert max(taken) > 1, "one step each would waste the budget"


def test_auto_without_a_budget_takes_all_steps_on_an_idle_engine(engine: DiffusionEngine) -> None:
    future = engine.submit(PARAMS, Delivery(min_inference_steps=2))
    run_dry(engine)
    assert future.result(TIMEOUT_S).params.num_inference_steps == 4


def test_a_budget_that_cannot_be_kept_is_refused_before_any_work(engine: DiffusionEngine) -> None:
    with pytest.raises(InvalidRequestError, match=r"an idle engine needs 4500\.0 ms for 1 picture of 4 steps"):
        engine.submit(PARAMS, Delivery(latency_budget_ms=4000))
    wide = replace(PARAMS, width=24)
    engine.submit(PARAMS, Delivery(latency_budget_ms=5000))
    with pytest.raises(DeadlineError) as caught:
        engine.submit(wide, Delivery(latency_budget_ms=5000))
    assert caught.value.retry_after_s > 0
    assert engine.num_live == 1 and engine.stats.refused == 2
    run_dry(engine)
    assert engine.stats.finished == 1


@pytest.mark.parametrize("fewest", [0, 5, True, "1", 4.0])
def test_a_min_inference_steps_that_the_checkpoint_lacks_is_refused(engine: DiffusionEngine, fewest: object) -> None:
    with pytest.raises(InvalidRequestError, match="min_inference_steps is"):
        engine.submit(replace(PARAMS, num_inference_steps=3), Delivery(min_inference_steps=fewest))  # type: ignore[arg-type]


@pytest.mark.parametrize("budget_ms", [0, -1.0, float("nan"), float("inf"), True, "10"])
def test_a_budget_that_is_not_a_positive_number_is_refused(budget_ms: object) -> None:
    with pytest.raises(InvalidRequestError, match="latency_budget_ms is"):
        Delivery(latency_budget_ms=budget_ms)  # type: ignore[arg-type]


def test_background_work_comes_after_all_other_requests(tiny_model: LoadedModel) -> None:
    engine, ended = DiffusionEngine(tiny_model, EngineConfig(max_batch_size=1), costs=KnownCosts()), list[str]()

    def ask(name: str, delivery: Delivery) -> None:
        engine.submit(PARAMS, delivery).add_done_callback(lambda _: ended.append(name))

    ask("job", Delivery(is_background=True))
    for name in ("first", "second"):
        ask(name, Delivery())
    run_dry(engine)
    assert ended == ["first", "second", "job"]
    engine.close()


@pytest.mark.parametrize(("second_s", "sizes"), [(0.0, [2] * 5), (0.5, [1] * 10)])
def test_background_work_joins_a_call_only_if_it_hardly_lengthens_it(
    tiny_model: LoadedModel, second_s: float, sizes: list[int]
) -> None:
    class Costs(KnownCosts):
        """Each sample after the first makes a call longer."""

        def seconds(self, kind: Kind, size: int = 1) -> float:
            return 1.0 + second_s * (size - 1)

    engine = DiffusionEngine(tiny_model, costs=Costs())
    futures = [engine.submit(PARAMS, Delivery(is_background=is_background)) for is_background in (True, False)]
    seen = list[int]()
    while engine.num_live:
        live = engine.num_live
        before = engine.stats.sample_steps
        engine.step()
        seen.append(engine.stats.sample_steps - before or live - engine.num_live)
    assert seen == sizes and all(future.done() for future in futures)
    engine.close()


def test_a_picture_that_misses_its_deadline_still_comes(tiny_model: LoadedModel) -> None:
    engine = DiffusionEngine(tiny_model, costs=KnownCosts())
    future = engine.submit(PARAMS, Delivery(latency_budget_ms=4600))
    engine.step()
    (sample,) = engine._scheduler.live()
    sample.promised_s = time.monotonic() - 1  # as if the machine had stopped for a while
    run_dry(engine)
    assert future.result(TIMEOUT_S).params == PARAMS
    assert engine.num_late == 1
    engine.close()


def test_warm_up_measures_every_kind_of_call(tiny_model: LoadedModel) -> None:
    with DiffusionEngine(tiny_model, EngineConfig(max_batch_size=4)) as engine:
        warm_up(engine)
        shapes = [tiny_model.latent_shape(replace(PARAMS, width=width)) for width in (16, 24)]
        stages = ("denoise", "decode:full", "decode:tiny")
        for kind in (
            call_kind(tiny_model, "text"),
            *(call_kind(tiny_model, stage, shape) for stage in stages for shape in shapes),
        ):
            assert engine.call_seconds(kind) > 0
        picture = engine.submit(PARAMS, Delivery(latency_budget_ms=60_000)).result(TIMEOUT_S)
        assert 0 < picture.predicted_ms < 60_000


def test_the_warm_up_of_a_slow_model_measures_one_size_and_makes_one_picture(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every limit of time is 0, as if each call took longer. Budgets still hold at the size that was left out."""
    for limit in ("KIND_S", "MODEL_S", "PICTURES_S"):
        monkeypatch.setattr(f"tdm_runtime.engine.warm_up.{limit}", 0.0)
    seen: list[tuple[int, int]] = []
    record = Changed(tiny_model, lambda latents: seen.append((len(latents), latents.shape[-1])))
    steps: list[int] = []
    with DiffusionEngine(
        replace(tiny_model, denoiser=record), observe_batch=lambda size, _: steps.append(size)
    ) as engine:
        warm_up(engine)
        assert set(seen) == {(1, 8)}, "one sample of the first size at a time"
        assert len(steps) == 1, "a picture of one step"
        wide = replace(PARAMS, width=24)
        with pytest.raises(InvalidRequestError, match="an idle engine needs"):
            engine.submit(wide, Delivery(latency_budget_ms=1e-3))
        assert engine.submit(wide, Delivery(latency_budget_ms=60_000)).result(TIMEOUT_S).predicted_ms > 0


# -- strict ----------------------------------------------------------------------------------------


def in_company(model: LoadedModel, delivery: Delivery) -> tuple[Picture, int]:
    """Return a picture requested together with five others, and the number of denoiser calls for all six."""
    engine = DiffusionEngine(model, costs=KnownCosts())
    width, height = model.recipe.native_sizes[0]
    params = replace(PARAMS, width=width, height=height)
    engine.submit_all([replace(params, seed=seed) for seed in range(10, 15)])
    future = engine.submit(params, delivery)
    run_dry(engine)
    engine.close()
    return future.result(TIMEOUT_S), engine.stats.steps


@pytest.mark.parametrize("name", ["torch", "openvino"])
def test_strict_pictures_have_the_same_bits_in_any_batch(tiny_model: LoadedModel, artifacts: Path, name: str) -> None:
    model = tiny_model
    if name == "openvino":
        model = load_model(DEFAULT_CHECKPOINT, BackendConfig("openvino", artifacts=artifacts))
    picture, num_calls = in_company(model, Delivery(strict=True))
    assert picture.is_strict
    np.testing.assert_array_equal(picture.pixels, generate(model, picture.params))
    assert num_calls == (4 if model.is_batch_invariant else 8), (
        "a strict picture shares calls only on a batch-invariant backend"
    )


# -- previews and drafts ---------------------------------------------------------------------------


def test_previews_equal_those_of_the_pipeline(engine: DiffusionEngine, tiny_model: LoadedModel) -> None:
    shown: list[Preview] = []
    future = engine.submit(PARAMS, Delivery(on_preview=shown.append, num_previews=2))
    run_dry(engine)
    expected: list[np.ndarray] = []
    pixels = generate(tiny_model, PARAMS, lambda step, pixels: expected.append(pixels))
    assert [preview.num_steps_taken for preview in shown] == [1, 2]
    for preview, picture in zip(shown, expected, strict=False):
        assert not preview.is_draft
        assert np.abs(preview.pixels.astype(int) - picture).max() <= MAX_LEVELS_APART
    assert np.abs(future.result(TIMEOUT_S).pixels.astype(int) - pixels).max() <= MAX_LEVELS_APART


def test_a_draft_is_the_picture_of_one_step_and_comes_first(engine: DiffusionEngine, tiny_model: LoadedModel) -> None:
    shown: list[Preview] = []
    future = engine.submit(PARAMS, Delivery(on_preview=shown.append, draft=True))
    while not shown:
        engine.step()
    assert not future.done() and engine.stats.steps == 1, "the draft shares the first step of its picture"
    run_dry(engine)
    (draft,) = shown
    assert draft.is_draft
    expected = generate(tiny_model, replace(PARAMS, num_inference_steps=1))
    assert np.abs(draft.pixels.astype(int) - expected).max() <= MAX_LEVELS_APART
    assert future.result(TIMEOUT_S).params == PARAMS
    assert engine.stats.finished == 1, "a draft does not count as a picture"


@pytest.mark.parametrize("is_alone", [True, False])
def test_previews_begin_with_the_second_step_after_a_draft(engine: DiffusionEngine, is_alone: bool) -> None:
    """Beside a more urgent picture, the second step is taken before the draft is decoded."""
    shown: list[Preview] = []
    if not is_alone:
        engine.submit(replace(PARAMS, seed=2))
        while not engine.stats.steps:
            engine.step()
    engine.submit(PARAMS, Delivery(on_preview=shown.append, draft=True, num_previews=3))
    run_dry(engine)
    assert [(preview.is_draft, preview.num_steps_taken) for preview in shown] == [(True, 1), (False, 2), (False, 3)]


def test_cancelling_a_picture_cancels_its_draft(engine: DiffusionEngine) -> None:
    shown: list[Preview] = []
    engine.submit(PARAMS, Delivery(on_preview=shown.append, draft=True, num_previews=3)).cancel()
    run_dry(engine)
    assert not shown and engine.stats.steps == 0


def test_a_failing_preview_listener_harms_no_picture(engine: DiffusionEngine) -> None:
    def fail(preview: Preview) -> None:
        raise RuntimeError("the listener is gone")

    future = engine.submit(PARAMS, Delivery(on_preview=fail, draft=True, num_previews=3))
    run_dry(engine)
    assert future.result(TIMEOUT_S).params == PARAMS


def test_previews_without_a_listener_are_refused() -> None:
    with pytest.raises(ValueError, match="on_preview"):
        Delivery(num_previews=1)


# -- exact repeats ---------------------------------------------------------------------------------


def test_a_repeated_request_comes_from_the_result_cache(tiny_model: LoadedModel) -> None:
    with DiffusionEngine(tiny_model, EngineConfig(result_cache_bytes=2 * 16 * 16 * 3)) as engine:
        first = engine.submit(PARAMS).result(TIMEOUT_S)
        steps = engine.stats.steps
        again = engine.submit(PARAMS).result(TIMEOUT_S)
        auto = engine.submit(PARAMS, Delivery(latency_budget_ms=60_000, min_inference_steps=1)).result(TIMEOUT_S)
        assert engine.stats.steps == steps and engine.result_cache_hits == 2
        assert again.is_cached and auto.is_cached and not first.is_cached
        np.testing.assert_array_equal(again.pixels, first.pixels)
        strict = engine.submit(PARAMS, Delivery(strict=True)).result(TIMEOUT_S)
        assert not strict.is_cached, "a picture made in a batch is not strict"
        for seed in (2, 3):
            engine.submit(replace(PARAMS, seed=seed)).result(TIMEOUT_S)
        assert not engine.submit(PARAMS).result(TIMEOUT_S).is_cached, "the cache holds two pictures"


def test_without_a_cache_every_picture_is_made(tiny_model: LoadedModel) -> None:
    with DiffusionEngine(tiny_model) as engine:
        assert not any(engine.submit(PARAMS).result(TIMEOUT_S).is_cached for _ in range(2))


# -- isolation -------------------------------------------------------------------------------------


class Changed:
    """A real backend whose calls may be delayed or fail."""

    def __init__(self, model: LoadedModel, before: Callable[[Tensor], None]) -> None:
        self.device, self.is_batch_invariant = model.denoiser.device, False
        self._backend, self._before = model.denoiser, before

    def __call__(self, *inputs: Tensor) -> Tensor:
        self._before(inputs[0])
        return self._backend(*inputs)


def test_out_of_memory_splits_the_batch_and_later_ones_are_smaller(tiny_model: LoadedModel) -> None:
    sizes: list[int] = []

    def refuse_many(latents: Tensor) -> None:
        sizes.append(len(latents))
        if len(latents) > 2:
            raise torch.OutOfMemoryError("no room")

    engine = DiffusionEngine(replace(tiny_model, denoiser=Changed(tiny_model, refuse_many)))
    futures = engine.submit_all([replace(PARAMS, seed=seed, num_inference_steps=2) for seed in range(4)])
    run_dry(engine)
    assert all(future.exception(TIMEOUT_S) is None for future in futures)
    assert sizes[:3] == [4, 2, 2] and max(sizes[3:]) <= 2
    engine.close()


def test_a_call_that_never_fits_into_memory_fails_only_its_request(tiny_model: LoadedModel) -> None:
    def refuse_wide(latents: Tensor) -> None:
        if latents.shape[-1] == 12:
            raise torch.OutOfMemoryError("no room")

    with DiffusionEngine(replace(tiny_model, denoiser=Changed(tiny_model, refuse_wide))) as engine:
        wide, small = engine.submit_all([replace(PARAMS, width=24), PARAMS])
        assert type(wide.exception(TIMEOUT_S)) is GenerationError
        assert small.result(TIMEOUT_S).params == PARAMS


def test_large_pictures_do_not_block_a_small_one(tiny_model: LoadedModel) -> None:
    """A small picture behind four large ones waits for one of their calls, not for sixteen."""
    entered, go_on, order = threading.Event(), threading.Event(), []
    go_on.set()

    def slow_if_wide(latents: Tensor) -> None:
        order.append(latents.shape[-1])
        entered.set()
        if latents.shape[-1] == 12:
            time.sleep(0.05)
            assert go_on.wait(TIMEOUT_S)

    with DiffusionEngine(replace(tiny_model, denoiser=Changed(tiny_model, slow_if_wide)), EngineConfig()) as engine:
        warm_up(engine)
        order.clear()
        entered.clear()
        go_on.clear()
        large = [engine.submit(replace(PARAMS, width=24, seed=seed), Delivery(strict=True)) for seed in range(4)]
        assert entered.wait(TIMEOUT_S)
        small = engine.submit(PARAMS)
        go_on.set()
        small.result(TIMEOUT_S)
        assert order.count(12) <= 3, "the running call, and one or two more on a slow machine"
        for future in large:
            future.result(TIMEOUT_S)
