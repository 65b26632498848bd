"""The engine makes the pipeline's pictures in any batch and answers every request exactly once."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, wait
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tdm_runtime.backends import Backend
from tdm_runtime.engine.delivery import Delivery
from tdm_runtime.engine.engine import DiffusionEngine, EngineConfig
from tdm_runtime.engine.replies import EngineStats
from tdm_runtime.engine.sample import Picture
from tdm_runtime.errors import GenerationError, InvalidRequestError, NotFiniteError, OverloadedError, TDMError
from tdm_runtime.model.choice import load_model
from tdm_runtime.model.decoder import Decoder, Pixels
from tdm_runtime.model.loaded_model import LoadedModel
from tdm_runtime.model.text_encoder import PromptEmbedding, PromptKey, TextEncoder
from tdm_runtime.params import SamplingParams
from tdm_runtime.pipeline import generate
from tdm_runtime.sampling.noise import initial_noise
from tdm_runtime.sampling.solvers import Solver
from tdm_runtime.scheduling.cost_model import CostModel, Kind

MAX_LEVELS_APART = 2
"""Tolerance in levels of 255: sums over a batch round differently from those of one sample."""
TIMEOUT_S = 60.0
"""Limit for work that takes well under a second, so only a hang reaches it."""
PROMPTS = ("a red apple", "two green trees on blue", "a fox")
MARKED_STEPS = 3
"""Step count of the requests that the tests below make fail."""

Futures = list[Future[Picture]]


# -- models ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_model(tiny_checkpoint: Path) -> LoadedModel:
    """A model with random weights at minimal size: DPM-Solver++ 2M, pictures of 16x16 and 24x16, two decoders."""
    return load_model(tiny_checkpoint, device="cpu")


@pytest.fixture(params=["embedded", "tiny"])
def any_model(request: pytest.FixtureRequest) -> LoadedModel:
    """The embedded model, and the tiny one with two shapes and another solver."""
    chosen: LoadedModel = request.getfixturevalue("model" if request.param == "embedded" else "tiny_model")
    return chosen


class Observed:
    """A real backend that records its calls and may change the output or fail."""

    name = "observed"

    def __init__(self, backend: Backend, change: Callable[[Tensor, Tensor], Tensor] | None = None) -> None:
        self.device = backend.device
        self.is_batch_invariant = backend.is_batch_invariant
        self.calls: list[tuple[Tensor, Tensor]] = []
        """Latents [B, C, H, W] and timesteps [B] of every call."""
        self._backend = backend
        self._change = change

    def __call__(self, latents: Tensor, timesteps: Tensor, step_counts: Tensor, prompt_embeds: Tensor) -> Tensor:
        self.calls.append((latents.clone(), timesteps.clone()))
        output = self._backend(latents, timesteps, step_counts, prompt_embeds)
        return output if self._change is None else self._change(output, step_counts)


def observed(
    model: LoadedModel, change: Callable[[Tensor, Tensor], Tensor] | None = None
) -> tuple[LoadedModel, Observed]:
    backend = Observed(model.denoiser, change)
    return replace(model, denoiser=backend), backend


def spoil_marked(output: Tensor, step_counts: Tensor) -> Tensor:
    """Put a NaN into the marked rows."""
    spoiled = output.clone()
    spoiled[step_counts == MARKED_STEPS, 0, 0, 0] = float("nan")
    return spoiled


def refuse_marked(output: Tensor, step_counts: Tensor) -> Tensor:
    """Fail on a whole batch because of one sample, as some operators do."""
    if (step_counts == MARKED_STEPS).any():
        raise RuntimeError("out of memory")
    return output


# -- requests --------------------------------------------------------------------------------------


def request_for(model: LoadedModel, seed: int, steps: int, shape: int = 0) -> SamplingParams:
    """Return a request of a native size, with a prompt that depends on the seed."""
    sizes = model.recipe.native_sizes
    width, height = sizes[shape % len(sizes)]
    return SamplingParams(PROMPTS[seed % len(PROMPTS)], seed, steps, width, height)


def mixed_requests(model: LoadedModel) -> list[SamplingParams]:
    """Return a request for every step count and size, each with a seed of its own."""
    shapes, counts = len(model.recipe.native_sizes), model.recipe.step_counts
    return [request_for(model, seed, counts[seed % len(counts)], seed // len(counts)) for seed in range(4 * shapes)]


def assert_same_picture(actual: Pixels, expected: Pixels) -> None:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype == np.uint8
    assert np.abs(actual.astype(int) - expected).max() <= MAX_LEVELS_APART


def assert_pipelines_pictures(model: LoadedModel, requests: list[SamplingParams], futures: Futures) -> None:
    """Assert that each future holds the picture that the pipeline makes."""
    for params, future in zip(requests, futures, strict=True):
        picture = future.result(TIMEOUT_S)
        assert picture.params == params
        assert_same_picture(picture.pixels, generate(model, params))


class EqualCosts(CostModel):
    """Every call costs the same, so all samples that can share a call do."""

    seconds_a_call = 1e-3

    def seconds(self, kind: Kind, size: int = 1) -> float:
        return self.seconds_a_call

    def observe(self, kind: Kind, size: int, seconds: float, now_s: float, is_calm: bool = False) -> None:
        pass

    def batch_size(self, kind: Kind, available: int) -> int:
        return available


@pytest.fixture
def make_engine() -> Iterator[Callable[..., DiffusionEngine]]:
    """Builds engines that were not started; the test calls `step` itself. They are closed at the end."""
    engines: list[DiffusionEngine] = []

    def make(model: LoadedModel, sizes: list[int] | None = None, **config: float) -> DiffusionEngine:
        observe = (lambda size, seconds: None) if sizes is None else (lambda size, seconds: sizes.append(size))
        engines.append(DiffusionEngine(model, EngineConfig(**config), observe, EqualCosts()))  # type: ignore[arg-type]
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


MakeEngine = Callable[..., DiffusionEngine]


def run_dry(engine: DiffusionEngine) -> None:
    """Make calls until every sample is answered."""
    for _ in range(1000):
        if not engine.num_live:
            return
        engine.step()
    pytest.fail(f"{engine.num_live} samples are still unanswered after 1000 calls")


# -- the engine equals the pipeline ----------------------------------------------------------------


def test_pictures_are_not_flat_and_differ_by_seed(any_model: LoadedModel) -> None:
    one, other = (generate(any_model, request_for(any_model, seed, 4)) for seed in (0, 1))
    assert one.std() > MAX_LEVELS_APART
    assert np.abs(one.astype(int) - other).max() > MAX_LEVELS_APART


def test_requests_submitted_together_equal_the_pipeline(any_model: LoadedModel) -> None:
    requests = mixed_requests(any_model)
    with DiffusionEngine(any_model) as engine:
        futures = engine.submit_all(requests)
        wait(futures, TIMEOUT_S)
    assert_pipelines_pictures(any_model, requests, futures)


def test_requests_of_one_batch_may_use_different_decoders(tiny_model: LoadedModel, make_engine: MakeEngine) -> None:
    engine = make_engine(tiny_model)
    alternating = zip(mixed_requests(tiny_model), tuple(tiny_model.decoders) * 4, strict=True)
    requests = [replace(params, decoder=decoder) for params, decoder in alternating]
    futures = engine.submit_all(requests)
    run_dry(engine)
    assert_pipelines_pictures(tiny_model, requests, futures)
    full, tiny = (generate(tiny_model, replace(requests[0], decoder=name)).astype(int) for name in tiny_model.decoders)
    assert np.abs(full - tiny).max() > MAX_LEVELS_APART


def test_requests_submitted_between_steps_equal_the_pipeline(any_model: LoadedModel, make_engine: MakeEngine) -> None:
    requests, engine = mixed_requests(any_model), make_engine(any_model, max_batch_size=3)
    futures: Futures = []
    for params in requests:
        futures.append(engine.submit(params))
        engine.step()
    run_dry(engine)
    assert_pipelines_pictures(any_model, requests, futures)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    arrivals=st.lists(
        st.tuples(st.integers(0, 9), st.integers(1, 4), st.integers(0, 1), st.integers(0, 2), st.booleans()), max_size=8
    ),
    capacity=st.integers(1, 4),
)
def test_any_traffic_equals_the_pipeline(
    tiny_model: LoadedModel, arrivals: list[tuple[int, int, int, int, bool]], capacity: int
) -> None:
    """An arrival is (seed, step count, shape, engine steps after it, whether it is cancelled then)."""
    model, backend = observed(tiny_model)
    engine = DiffusionEngine(model, EngineConfig(max_batch_size=capacity))
    kept: list[SamplingParams] = []
    futures: Futures = []
    for seed, steps, shape, pause, is_cancelled in arrivals:
        params = request_for(tiny_model, seed, steps, shape)
        future = engine.submit(params)
        for _ in range(pause):
            engine.step()
        if not (is_cancelled and future.cancel()):
            kept.append(params)
            futures.append(future)
    run_dry(engine)
    assert all(len(latents) <= capacity for latents, _ in backend.calls)
    assert_pipelines_pictures(tiny_model, kept, futures)
    engine.close()


def test_batched_equals_alone(any_model: LoadedModel, make_engine: MakeEngine) -> None:
    requests = [request_for(any_model, seed, 4) for seed in range(4)]
    pictures = []
    for groups in ([requests], [[params] for params in requests]):
        engine = make_engine(any_model)
        futures: Futures = []
        for group in groups:
            futures += engine.submit_all(group)
            run_dry(engine)
        pictures.append([future.result(TIMEOUT_S).pixels for future in futures])
    for batched, alone in zip(*pictures, strict=True):
        assert_same_picture(batched, alone)


@pytest.mark.parametrize("solver", ["renoise", "lcm"])
def test_fresh_noise_is_the_same_alone_and_in_company(
    solver: Solver, any_model: LoadedModel, make_engine: MakeEngine
) -> None:
    """Samples that draw noise share calls with samples that draw none, and at other steps."""
    drawing = replace(any_model, recipe=replace(any_model.recipe, solver=solver))
    engine, futures = make_engine(any_model), []
    asked = [(model, request_for(any_model, seed, 4 - seed % 2)) for seed in range(4) for model in (drawing, any_model)]
    for model, params in asked:
        futures.append(engine.submit(params, model=model))
        engine.step()
    run_dry(engine)
    for (model, params), future in zip(asked, futures, strict=True):
        assert_same_picture(future.result(TIMEOUT_S).pixels, generate(model, params))


def test_a_batch_that_fails_and_is_tried_again_draws_the_same_noise(
    tiny_model: LoadedModel, make_engine: MakeEngine
) -> None:
    noisy = replace(tiny_model, recipe=replace(tiny_model.recipe, solver="renoise"))
    model, _ = observed(noisy, refuse_marked)
    engine = make_engine(model)
    requests = [request_for(noisy, seed, steps) for seed, steps in enumerate((4, MARKED_STEPS, 2, 4))]
    futures = engine.submit_all(requests)
    run_dry(engine)
    for params, future in zip(requests, futures, strict=True):
        if params.num_inference_steps != MARKED_STEPS:
            assert_same_picture(future.result(TIMEOUT_S).pixels, generate(noisy, params))


def test_the_same_request_twice_makes_the_same_picture(any_model: LoadedModel, make_engine: MakeEngine) -> None:
    engine, params = make_engine(any_model), request_for(any_model, 5, 4)
    pictures = []
    for _ in range(2):
        future = engine.submit(params)
        run_dry(engine)
        pictures.append(future.result(TIMEOUT_S).pixels)
    np.testing.assert_array_equal(pictures[0], pictures[1])


def test_initial_noise_is_bit_equal_in_any_batch(any_model: LoadedModel, make_engine: MakeEngine) -> None:
    requests = [request_for(any_model, seed, 1 + seed) for seed in range(4)]
    model, backend = observed(any_model)
    engine = make_engine(model)
    engine.submit_all(requests)
    engine.step()
    [(batched, _)] = backend.calls
    for params, latents in zip(requests, batched, strict=True):
        scale = any_model.recipe.step_table(params.num_inference_steps, params.width, params.height).initial_scale
        assert torch.equal(latents, scale * initial_noise(params.seed, any_model.latent_shape(params)))
        alone, reference = observed(any_model)
        generate(alone, params)
        assert torch.equal(reference.calls[0][0][0], latents)


def test_a_sample_takes_each_of_its_own_timesteps_in_order(tiny_model: LoadedModel, make_engine: MakeEngine) -> None:
    model, backend = observed(tiny_model)
    engine = make_engine(model)
    engine.submit_all([request_for(tiny_model, seed, steps) for seed, steps in enumerate((4, 2))])
    run_dry(engine)
    called = [timesteps.tolist() for _, timesteps in backend.calls]
    four, two = (tiny_model.recipe.timesteps[steps] for steps in (4, 2))
    assert called == [[two[0], four[0]], [two[1], four[1]], [four[2]], [four[3]]], "the shorter one is due sooner"


# -- batches ---------------------------------------------------------------------------------------


def test_newcomers_join_and_finished_samples_leave_between_steps(model: LoadedModel, make_engine: MakeEngine) -> None:
    sizes: list[int] = []
    engine = make_engine(model, sizes)
    requests = [request_for(model, 0, 4), request_for(model, 1, 2), request_for(model, 2, 1)]
    futures = [engine.submit(requests[0])]
    engine.step()
    futures.append(engine.submit(requests[1]))
    engine.step()
    futures.append(engine.submit(requests[2]))
    run_dry(engine)
    assert sizes == [1, 2, 3, 1]
    assert_pipelines_pictures(model, requests, futures)


def test_a_newcomer_joins_a_running_engine(tiny_model: LoadedModel) -> None:
    entered, released = threading.Event(), threading.Event()

    def hold(output: Tensor, _: Tensor) -> Tensor:
        entered.set()
        assert released.wait(TIMEOUT_S)
        return output

    sizes: list[int] = []
    requests = [request_for(tiny_model, 0, 2), request_for(tiny_model, 1, 1)]
    with DiffusionEngine(observed(tiny_model, hold)[0], observe_batch=lambda size, _: sizes.append(size)) as engine:
        futures = [engine.submit(requests[0])]
        assert entered.wait(TIMEOUT_S)
        futures.append(engine.submit(requests[1]))
        released.set()
        wait(futures, TIMEOUT_S)
    assert sizes == [1, 2]
    assert_pipelines_pictures(tiny_model, requests, futures)


def test_two_shapes_never_share_a_batch(tiny_model: LoadedModel, make_engine: MakeEngine) -> None:
    sizes: list[int] = []
    model, backend = observed(tiny_model)
    engine = make_engine(model, sizes, max_batch_size=3)
    requests = mixed_requests(tiny_model)
    futures = engine.submit_all(requests)
    run_dry(engine)
    rows_of_shape: dict[tuple[int, ...], int] = {}
    for latents, _ in backend.calls:
        shape = tuple(latents.shape[1:])
        rows_of_shape[shape] = rows_of_shape.get(shape, 0) + len(latents)
    assert rows_of_shape == {(4, 8, 8): 1 + 2 + 3 + 4, (4, 8, 12): 1 + 2 + 3 + 4}
    assert max(sizes) == 3 and sum(sizes) == engine.stats.sample_steps == 20
    assert_pipelines_pictures(tiny_model, requests, futures)


def test_an_earlier_deadline_goes_first(tiny_model: LoadedModel, make_engine: MakeEngine) -> None:
    model, backend = observed(tiny_model)
    engine = make_engine(model, max_batch_size=1, patience=1e6)
    engine.submit(request_for(tiny_model, 0, 1))
    engine.submit(request_for(tiny_model, 1, 1), Delivery(latency_budget_ms=60_000))
    engine.submit(request_for(tiny_model, 2, 1), Delivery(latency_budget_ms=40_000))
    run_dry(engine)
    order = [latents[0] for latents, _ in backend.calls]
    for latents, seed in zip(order, (2, 1, 0), strict=True):
        assert torch.equal(latents, initial_noise(seed, tuple(latents.shape)))


# -- cancelling ------------------------------------------------------------------------------------


def test_a_sample_cancelled_before_its_first_step_takes_none(model: LoadedModel, make_engine: MakeEngine) -> None:
    sizes: list[int] = []
    engine = make_engine(model, sizes)
    requests = [request_for(model, seed, 2) for seed in range(3)]
    futures = engine.submit_all(requests)
    assert futures[1].cancel()
    run_dry(engine)
    assert sizes == [2, 2]
    assert_pipelines_pictures(model, requests[::2], futures[::2])
    assert (engine.stats.cancelled, engine.num_live) == (1, 0)


def test_a_sample_cancelled_in_flight_leaves_at_the_next_step(any_model: LoadedModel, make_engine: MakeEngine) -> None:
    sizes: list[int] = []
    engine = make_engine(any_model, sizes)
    requests = [request_for(any_model, seed, 4) for seed in range(3)]
    futures = engine.submit_all(requests)
    engine.step()
    assert futures[0].cancel()
    run_dry(engine)
    assert sizes == [3, 2, 2, 2]
    assert_pipelines_pictures(any_model, requests[1:], futures[1:])
    assert (engine.stats.cancelled, engine.num_live) == (1, 0)


def test_a_wait_for_a_cancelled_picture_ends(tiny_model: LoadedModel) -> None:
    with DiffusionEngine(tiny_model) as engine:
        future = engine.submit(request_for(tiny_model, 0, 4))
        was_cancelled = future.cancel()
        assert not wait([future], TIMEOUT_S).not_done
    assert future.cancelled() == was_cancelled
    if was_cancelled:
        with pytest.raises(CancelledError):
            future.result()


def test_no_step_is_taken_when_all_requests_are_cancelled(tiny_model: LoadedModel, make_engine: MakeEngine) -> None:
    engine = make_engine(tiny_model)
    for future in engine.submit_all(mixed_requests(tiny_model)):
        future.cancel()
    run_dry(engine)
    assert (engine.stats.steps, engine.stats.cancelled, engine.num_live) == (0, len(mixed_requests(tiny_model)), 0)


# -- failures --------------------------------------------------------------------------------------


def with_one_marked(model: LoadedModel) -> list[SamplingParams]:
    return [request_for(model, 0, 4), request_for(model, 1, MARKED_STEPS), request_for(model, 2, 2)]


def assert_only_the_marked_failed(model: LoadedModel, futures: Futures, kind: type[TDMError]) -> None:
    requests = with_one_marked(model)
    error = futures[1].exception(TIMEOUT_S)
    assert type(error) is kind and str(error)
    assert_pipelines_pictures(model, requests[::2], futures[::2])


def test_nan_fails_only_its_request(any_model: LoadedModel, make_engine: MakeEngine) -> None:
    sizes: list[int] = []
    engine = make_engine(observed(any_model, spoil_marked)[0], sizes)
    futures = engine.submit_all(with_one_marked(any_model))
    run_dry(engine)
    assert_only_the_marked_failed(any_model, futures, NotFiniteError)
    assert sizes == [3, 2, 1, 1], "the failed sample leaves after the step that made the NaN"
    assert (engine.stats.failed, engine.num_live) == (1, 0)


def test_a_failing_batch_is_split_and_only_the_culprit_fails(any_model: LoadedModel, make_engine: MakeEngine) -> None:
    model, backend = observed(any_model, refuse_marked)
    engine = make_engine(model)
    futures = engine.submit_all(with_one_marked(any_model))
    run_dry(engine)
    assert_only_the_marked_failed(any_model, futures, GenerationError)
    assert [len(latents) for latents, _ in backend.calls] == [3, 1, 2, 1, 1, 2, 1, 1]


def test_the_pipeline_fails_on_nan_too(tiny_model: LoadedModel) -> None:
    with pytest.raises(NotFiniteError):
        generate(observed(tiny_model, spoil_marked)[0], request_for(tiny_model, 1, MARKED_STEPS))


class FailingTextEncoder(TextEncoder):
    """A real text encoder that fails on one prompt."""

    def __init__(self, encoder: TextEncoder, prompt: str) -> None:
        self.__dict__.update(encoder.__dict__)
        self._failing_prompt = prompt

    def encode_all(self, keys: Sequence[PromptKey]) -> list[PromptEmbedding]:
        if self._failing_prompt in [key.text for key in keys]:
            raise RuntimeError("Already borrowed")
        return super().encode_all(keys)


def test_a_prompt_that_cannot_be_encoded_fails_only_its_request(model: LoadedModel, make_engine: MakeEngine) -> None:
    engine = make_engine(replace(model, text_encoder=FailingTextEncoder(model.text_encoder, PROMPTS[1])))
    futures = engine.submit_all(with_one_marked(model))
    run_dry(engine)
    assert_only_the_marked_failed(model, futures, GenerationError)


class FailingDecoder(Decoder):
    """A real decoder that fails on batches, or on everything."""

    def __init__(self, decoder: Decoder, max_batch_size: int) -> None:
        self.__dict__.update(decoder.__dict__)
        self._max_batch_size = max_batch_size

    def decode(self, latents: Tensor) -> Pixels:
        if len(latents) > self._max_batch_size:
            raise RuntimeError("out of memory")
        return super().decode(latents)


def test_a_batch_that_cannot_be_decoded_is_split(model: LoadedModel, make_engine: MakeEngine) -> None:
    requests = [request_for(model, seed, 2) for seed in range(3)]
    engine = make_engine(replace(model, decoders={"full": FailingDecoder(model.decoders["full"], max_batch_size=1)}))
    futures = engine.submit_all(requests)
    run_dry(engine)
    assert_pipelines_pictures(model, requests, futures)


def test_a_failing_decoder_fails_its_requests_and_the_engine_goes_on(model: LoadedModel) -> None:
    with DiffusionEngine(
        replace(model, decoders={"full": FailingDecoder(model.decoders["full"], max_batch_size=0)})
    ) as engine:
        for future in engine.submit_all([request_for(model, seed, 1) for seed in range(2)]):
            assert type(future.exception(TIMEOUT_S)) is GenerationError
        assert engine.is_healthy
        assert (engine.stats.failed, engine.num_live) == (2, 0)


# -- bounds ----------------------------------------------------------------------------------------


def test_a_submission_beyond_max_live_is_refused_as_a_whole(tiny_model: LoadedModel, make_engine: MakeEngine) -> None:
    engine = make_engine(tiny_model, max_live=3)
    requests = [request_for(tiny_model, seed, 2) for seed in range(3)]
    futures = engine.submit_all(requests[:2])
    for too_many in (requests[:2], requests[:2] * 50):
        with pytest.raises(OverloadedError, match="at most 3") as caught:
            engine.submit_all(too_many)
        assert caught.value.retry_after_s > 0
        assert engine.num_live == 2
    futures.append(engine.submit(requests[2]))
    with pytest.raises(OverloadedError):
        engine.submit(requests[0])
    run_dry(engine)
    assert_pipelines_pictures(tiny_model, requests, futures)
    assert (engine.stats.finished, engine.stats.refused) == (3, 2 + 100 + 1)
    futures = engine.submit_all(requests)  # there is room again
    run_dry(engine)
    assert_pipelines_pictures(tiny_model, requests, futures)


def test_a_longer_queue_means_a_later_retry(tiny_model: LoadedModel, make_engine: MakeEngine) -> None:
    retries_s = []
    for max_live in (50, 100):
        engine = make_engine(tiny_model, max_live=max_live, max_batch_size=1)
        engine.costs.seconds_a_call = 1.0  # type: ignore[attr-defined]
        engine.submit_all([request_for(tiny_model, 0, 1)] * max_live)
        with pytest.raises(OverloadedError) as caught:
            engine.submit(request_for(tiny_model, 0, 1))
        retries_s.append(caught.value.retry_after_s)
    assert 2 * retries_s[0] == pytest.approx(retries_s[1])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_inference_steps", 5),
        ("num_inference_steps", 0),
        ("num_inference_steps", True),
        ("width", 17),
        ("height", 16.0),
    ],
)
def test_a_bad_request_leaves_the_engine_untouched(
    tiny_model: LoadedModel, make_engine: MakeEngine, name: str, value: object
) -> None:
    engine, good = make_engine(tiny_model), request_for(tiny_model, 0, 1)
    bad = replace(good, **{name: value})  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError):
        engine.submit(bad)
    with pytest.raises(InvalidRequestError):
        engine.submit_all([good, bad])
    engine.step()
    assert engine.num_live == 0
    assert engine.stats == EngineStats()


@pytest.mark.parametrize("name", ["max_batch_size", "max_live"])
def test_a_limit_below_one_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0"):
        EngineConfig(**{name: 0})


def test_an_empty_submission_returns_no_futures(tiny_model: LoadedModel, make_engine: MakeEngine) -> None:
    engine = make_engine(tiny_model)
    assert engine.submit_all([]) == []
    engine.step()
    assert engine.stats == EngineStats()


# -- the engine's life -----------------------------------------------------------------------------


def test_close_finishes_accepted_requests_and_refuses_later_ones(tiny_model: LoadedModel) -> None:
    requests = mixed_requests(tiny_model)
    engine = DiffusionEngine(tiny_model)
    futures = engine.submit_all(requests)
    assert not engine.is_healthy
    engine.start()
    assert engine.is_healthy
    engine.close()
    assert all(future.done() for future in futures)
    assert not engine.is_healthy and engine.num_live == 0
    with pytest.raises(OverloadedError, match="stopping") as caught:
        engine.submit(requests[0])
    assert caught.value.retry_after_s > 0
    engine.close()
    assert_pipelines_pictures(tiny_model, requests, futures)


def test_closing_an_engine_that_never_started_fails_accepted_requests(tiny_model: LoadedModel) -> None:
    engine = DiffusionEngine(tiny_model)
    future = engine.submit(request_for(tiny_model, 0, 1))
    engine.close()
    assert type(future.exception(TIMEOUT_S)) is GenerationError


def test_when_the_thread_dies_every_waiting_request_fails(tiny_model: LoadedModel) -> None:
    def die(size: int, seconds: float) -> None:
        raise RuntimeError("the observer failed")

    engine = DiffusionEngine(tiny_model, EngineConfig(max_batch_size=2), die)
    # In the first batch one sample takes its last step and one does not; the others wait.
    futures = engine.submit_all([request_for(tiny_model, seed, steps) for seed, steps in enumerate((1, 4, 1, 2))])
    futures.append(engine.submit(request_for(tiny_model, 9, 1, shape=1)))
    futures[3].cancel()
    engine.start()
    assert not wait(futures, TIMEOUT_S).not_done
    for future in (*futures[:3], futures[4]):
        assert isinstance(future.exception(), TDMError)
    assert not engine.is_healthy and engine.num_live == 0
    with pytest.raises(OverloadedError):
        engine.submit(request_for(tiny_model, 0, 1))
    engine.close()


def test_when_the_thread_dies_a_waiting_task_fails(tiny_model: LoadedModel) -> None:
    taken, ready = threading.Event(), threading.Event()

    def die(size: int, seconds: float) -> None:
        taken.set()
        assert ready.wait(TIMEOUT_S)
        raise RuntimeError("the observer failed")

    engine = DiffusionEngine(tiny_model, EngineConfig(), die)
    engine.start()
    engine.submit(request_for(tiny_model, 0, 1))
    assert taken.wait(TIMEOUT_S)
    threading.Timer(0.2, ready.set).start()  # the thread is in a call, and dies after the task was given to it
    with pytest.raises(RuntimeError, match="thread died"):
        engine.run_on_thread(lambda: None)
    engine.close()


def test_every_request_is_answered_exactly_once_in_a_storm(tiny_model: LoadedModel) -> None:
    """Four threads submit, cancel at random and meet failures."""
    model, _ = observed(tiny_model, spoil_marked)
    answers: list[Future[Picture]] = []
    accepted: list[tuple[SamplingParams, Future[Picture]]] = []

    def submit_and_cancel(thread: int) -> None:
        rng = random.Random(thread)
        mine: Futures = []
        for n in range(15):
            requests = [
                request_for(model, rng.randrange(10), rng.randint(1, 4), rng.randrange(2))
                for _ in range(rng.randint(1, 3))
            ]
            budget_ms = 1 + 1000 * rng.random() if n % 2 else None  # without one, even a stalled machine accepts
            try:
                futures = engine.submit_all(requests, Delivery(latency_budget_ms=budget_ms))
            except (OverloadedError, InvalidRequestError):
                wait(mine, TIMEOUT_S)
                continue
            for future in futures:
                future.add_done_callback(answers.append)
            accepted.extend(zip(requests, futures, strict=True))
            mine.extend(futures)
            if n % 3 == 0:
                mine[rng.randrange(len(mine))].cancel()
            if n % 5 == 4:
                wait([rng.choice(mine)], TIMEOUT_S)

    with DiffusionEngine(model, EngineConfig(max_batch_size=4, max_live=24)) as engine:
        threads = [threading.Thread(target=submit_and_cancel, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(TIMEOUT_S)
        assert not wait([future for _, future in accepted], TIMEOUT_S).not_done
    assert len(answers) == len(set(answers)) == len(accepted)
    stats = engine.stats
    assert stats.finished + stats.failed + stats.cancelled == len(accepted)
    assert stats.cancelled == sum(future.cancelled() for _, future in accepted)
    assert stats.finished > 0 and stats.failed > 0 and engine.num_live == 0
    pictures: dict[SamplingParams, Pixels] = {}
    for params, future in accepted:
        if future.cancelled():
            continue
        if params.num_inference_steps == MARKED_STEPS:
            assert type(future.exception()) is NotFiniteError
            continue
        if params not in pictures:
            pictures[params] = generate(tiny_model, params)
        assert_same_picture(future.result().pixels, pictures[params])


# -- timings and counters --------------------------------------------------------------------------


def test_timings_are_complete_and_add_up_to_at_most_the_wait(any_model: LoadedModel) -> None:
    requests = mixed_requests(any_model)
    with DiffusionEngine(any_model, EngineConfig(max_batch_size=2)) as engine:
        started_s = time.monotonic()
        pictures = [future.result(TIMEOUT_S) for future in engine.submit_all(requests)]
        waited_ms = 1e3 * (time.monotonic() - started_s)
    for params, picture in zip(requests, pictures, strict=True):
        timings = picture.timings
        assert len(timings.steps_ms) == params.num_inference_steps
        parts_ms = [timings.queue_ms, timings.text_ms, timings.decode_ms, *timings.steps_ms]
        assert min(parts_ms) >= 0
        assert sum(parts_ms) <= waited_ms + 1e-3
    assert pictures[-1].timings.queue_ms > pictures[0].timings.queue_ms


def test_a_picture_says_how_many_tokens_of_its_prompt_were_used(model: LoadedModel, make_engine: MakeEngine) -> None:
    engine = make_engine(model)
    short = request_for(model, 0, 1)
    futures = engine.submit_all([short, replace(short, prompt="a red apple " * 50)])
    run_dry(engine)
    cut, whole = futures[1].result(TIMEOUT_S), futures[0].result(TIMEOUT_S)
    assert whole.prompt.num_tokens <= whole.prompt.max_tokens == cut.prompt.max_tokens < cut.prompt.num_tokens


def test_counters_add_up(model: LoadedModel, make_engine: MakeEngine) -> None:
    sizes: list[int] = []
    engine = make_engine(observed(model, spoil_marked)[0], sizes)
    futures = engine.submit_all([*with_one_marked(model), request_for(model, 4, 4)])
    futures[3].cancel()
    run_dry(engine)
    wait(futures, TIMEOUT_S)
    stats = engine.stats
    assert (stats.finished, stats.failed, stats.cancelled, stats.refused) == (2, 1, 1, 0)
    assert (stats.steps, stats.sample_steps) == (len(sizes), sum(sizes))
