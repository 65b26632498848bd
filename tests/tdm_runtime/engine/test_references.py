"""The engine makes pictures from references as the reference loop does, in calls of equal references."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from tdm_runtime.backends import Backend
from tdm_runtime.edit import Edit
from tdm_runtime.engine.delivery import Delivery
from tdm_runtime.engine.engine import DiffusionEngine, EngineConfig
from tdm_runtime.engine.intake import Intake, call_kind
from tdm_runtime.engine.warm_up import warm_up
from tdm_runtime.errors import InvalidRequestError
from tdm_runtime.model.encoder import PictureEncoder
from tdm_runtime.model.loaded_model import LoadedModel
from tdm_runtime.params import SamplingParams
from tdm_runtime.pipeline import generate
from tdm_runtime.scheduling.cost_model import CostModel, Kind
from tests.reference_pictures import fitted, picture_of, pictures_of, save_attentive
from tests.stock_pictures import load_fp32

TIMEOUT_S = 60.0
MAX_LEVELS_APART = 2
WIDTH, HEIGHT = 96, 64


class Counting:
    """Backend that keeps the shapes of its calls."""

    def __init__(self, backend: Backend) -> None:
        self.device, self.is_batch_invariant = backend.device, True
        self.shapes: list[tuple[tuple[int, ...], ...]] = []
        self._backend = backend

    def __call__(self, *inputs: Tensor) -> Tensor:
        self.shapes.append(tuple(tuple(tensor.shape) for tensor in inputs))
        return self._backend(*inputs)


@pytest.fixture(scope="module")
def klein(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder: Path = tmp_path_factory.mktemp("references") / "klein"
    save_attentive(folder)
    model = load_fp32(folder)
    return replace(model, recipe=replace(model.recipe, native_sizes=((WIDTH, HEIGHT),)))


@pytest.fixture
def counted(klein: LoadedModel) -> tuple[LoadedModel, Counting, Counting]:
    """The model, with the shapes of the calls of its encoder and of its denoiser."""
    assert klein.encoder is not None
    encoder, denoiser = Counting(klein.encoder.backend), Counting(klein.denoiser)
    return replace(klein, encoder=PictureEncoder(encoder), denoiser=denoiser), encoder, denoiser


def params_of(
    model: LoadedModel, *sizes: tuple[int, int], seed: int = 0, steps: int = 4, start: float | None = None
) -> SamplingParams:
    """Return a request with a reference of each size, or one that starts from a picture."""
    edit = None if start is None else Edit(np.array(picture_of(WIDTH, HEIGHT, seed)), start)
    references = fitted(model, [picture_of(*size, seed=seed + n) for n, size in enumerate(sizes)])
    return SamplingParams(f"fox {seed}", seed, steps, WIDTH, HEIGHT, edit=edit, references=references)


def requests(model: LoadedModel) -> Iterator[SamplingParams]:
    """Yield plain pictures, edits by strength and by references of every arrangement."""
    for seed, steps in enumerate((1, 2, 4)):
        yield params_of(model, seed=seed, steps=steps)
        yield params_of(model, seed=seed, steps=steps, start=0.5)
        yield params_of(model, (WIDTH, HEIGHT), seed=seed, steps=steps)
        yield params_of(model, (HEIGHT, WIDTH), seed=seed, steps=steps)  # as many tokens in other places
        yield params_of(model, (64, 80), (64, 64), seed=seed, steps=steps)


def test_a_mixed_batch_equals_the_reference_loop(counted: tuple[LoadedModel, Counting, Counting]) -> None:
    model, _, denoiser = counted
    asked = list(requests(model))
    expected = [generate(model, params) for params in asked]
    denoiser.shapes.clear()
    engine = DiffusionEngine(model)
    futures = [engine.submit(params) for params in asked]  # before it starts, so that they meet
    with engine:
        made = [future.result(TIMEOUT_S) for future in futures]
    for params, one, wanted in zip(asked, made, expected, strict=True):
        assert np.abs(one.pixels.astype(int) - wanted).max() <= MAX_LEVELS_APART, params
    most = defaultdict[int, int](int)
    for shapes in denoiser.shapes:
        tokens = shapes[4][1] if len(shapes) > 4 else 0  # after latents, timesteps, K and prompt
        most[tokens] = max(most[tokens], shapes[0][0])
    assert most == {0: 6, 24: 3, 36: 3}, "pictures with the same arrangement share calls, and no others"


def test_each_reference_is_encoded_once(counted: tuple[LoadedModel, Counting, Counting]) -> None:
    model, encoder, _ = counted
    first, second, third = fitted(model, pictures_of(((WIDTH, HEIGHT), (64, 64), (64, 64))))
    plain = params_of(model)
    with DiffusionEngine(model) as engine:
        for references, encoded in (((first, second), 2), ((second, first), 0), ((second, third), 1), ((third,), 0)):
            encoder.shapes.clear()
            made = engine.submit(replace(plain, references=references)).result(TIMEOUT_S)
            assert sum(shapes[0][0] for shapes in encoder.shapes) == encoded
            assert (made.timings.image_ms > 0) == (encoded > 0)


def test_samples_that_miss_other_references_do_not_share_an_encoding(
    counted: tuple[LoadedModel, Counting, Counting],
) -> None:
    """The cost of the call is learned for what it encodes."""
    model, encoder, _ = counted
    known, *missing = fitted(model, pictures_of(((64, 64),) * 4))
    assert model.encoder is not None
    model.encoder.encode_all([known])
    engine, plain = DiffusionEngine(model), params_of(model, steps=1)
    futures = [engine.submit(replace(plain, references=both)) for both in (tuple(missing[:2]), (known, missing[2]))]
    with engine:
        for future in futures:
            future.result(TIMEOUT_S)
    assert {kind.shape for kind in engine.costs._measured if kind.stage == "encode_image"} == {(16, 1, 32), (16, 4, 4)}
    assert sum(shapes[0][0] for shapes in encoder.shapes) == 4


def test_pictures_of_equal_bytes_and_other_sizes_keep_their_latents_apart(klein: LoadedModel) -> None:
    assert klein.encoder is not None
    black = [Edit(np.zeros((*sides, 3), np.uint8), 0.5) for sides in ((64, 96), (96, 64))]
    assert [tuple(one.mean.shape[1:]) for one in klein.encoder.encode_all(black)] == [(4, 6), (6, 4)]


def test_a_step_with_references_has_a_cost_of_its_own(klein: LoadedModel) -> None:
    """Forecasts, budgets and "auto" read it, measured or estimated from a plain step."""
    costs = CostModel()
    intake = Intake(costs, 20.0, 3.0)
    plain_kind = call_kind(klein, "denoise", klein.latent_shape(params_of(klein)))
    costs.observe(plain_kind, 1, 1.0, 0.0)
    plain, one, two, turned = (
        intake.sample(klein, params_of(klein, *sizes), Delivery(), 0.0)
        for sizes in ((), ((96, 64),), ((96, 64), (96, 64)), ((64, 96),))
    )
    seconds = [sample.seconds_left(costs) / 4 for sample in (plain, one, two)]
    assert seconds[0] == 1.0 and seconds[1] >= 2.0 and seconds[2] >= 3.0
    assert one.denoise != turned.denoise and one.denoise.kind == turned.denoise.kind
    costs.observe(one.denoise.kind, 1, 1.5, 0.0)
    assert one.seconds_left(costs) == pytest.approx(6.0) and plain.seconds_left(costs) == pytest.approx(4.0)


def test_auto_takes_fewer_steps_with_references(klein: LoadedModel) -> None:
    steps, shape = [], klein.latent_shape(params_of(klein))
    for sizes in ((), ((WIDTH, HEIGHT),)):
        costs = CostModel()
        costs.observe(call_kind(klein, "denoise", shape), 1, 5.0, time.monotonic())
        engine = DiffusionEngine(klein, costs=costs)
        future = engine.submit(params_of(klein, *sizes), Delivery(latency_budget_ms=25_000, min_inference_steps=1))
        while not future.done():
            engine.step()
        steps.append(future.result(0).params.num_inference_steps)
        engine.close()
    assert steps == [4, 1]


def test_warm_up_measures_a_step_with_a_reference(klein: LoadedModel) -> None:
    with DiffusionEngine(klein, EngineConfig(max_batch_size=1)) as engine:
        warm_up(engine)
        assert engine.call_seconds(Kind("denoise", (klein.geometry.channels, 1, 48), klein.name)) > 0
        measured = {kind.shape for kind in engine.costs._measured if kind.stage == "denoise"}
    assert measured == {(16, 4, 6), (16, 1, 48)}


def test_a_backend_without_references_says_what_to_do(klein: LoadedModel) -> None:
    compiled = replace(klein, denoiser_inputs=klein.denoiser_inputs[:-2], backend="openvino bf16")
    assert klein.reads_references and not compiled.reads_references
    wanted = "it runs on openvino bf16: send strength to start from the picture, or run the model with --backend torch"
    with DiffusionEngine(compiled) as engine, pytest.raises(InvalidRequestError, match=wanted):
        engine.submit(params_of(klein, (WIDTH, HEIGHT)))
