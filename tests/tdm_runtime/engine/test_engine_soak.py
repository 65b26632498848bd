"""Ten thousand mixed requests: each is answered exactly once, and no memory, thread or file leaks."""

from __future__ import annotations

import gc
import os
import random
import threading
from collections import Counter
from concurrent.futures import Future, wait
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from tdm_runtime.engine.delivery import Delivery
from tdm_runtime.engine.engine import DiffusionEngine, EngineConfig
from tdm_runtime.engine.sample import Picture
from tdm_runtime.engine.warm_up import warm_up
from tdm_runtime.errors import InvalidRequestError, NotFiniteError, OverloadedError
from tdm_runtime.model.choice import load_model
from tdm_runtime.model.loaded_model import LoadedModel
from tdm_runtime.params import SamplingParams
from tdm_runtime.pipeline import generate

NUM_THREADS = 4
PROMPTS = ("a red apple", "two green trees on blue", "a fox")
BAD_SEEDS = (-1, 2**32, 2**64, 1.5, True, "7")
MAX_LEVELS_APART = 2


class Spoiled:
    """The real denoiser, with NaN in one row of about every hundredth call."""

    is_batch_invariant = False

    def __init__(self, model: LoadedModel) -> None:
        self.device = model.denoiser.device
        self._backend, self._random = model.denoiser, random.Random(0)
        self.num_rows = 0

    def __call__(self, *inputs: Tensor) -> Tensor:
        output = self._backend(*inputs)
        if self._random.random() < 0.01:
            output = output.clone()
            output[self._random.randrange(len(output))] = float("nan")
            self.num_rows += 1
        return output


class Client(threading.Thread):
    """A client that requests all kinds of pictures, cancels some, and counts the answers."""

    def __init__(self, engine: DiffusionEngine, seed: int, num_requests: int) -> None:
        super().__init__()
        self.answers: Counter[Future[Picture]] = Counter()
        self.accepted: list[tuple[SamplingParams, Delivery, Future[Picture]]] = []
        self.num_refused = 0
        self._engine, self._random, self._num_requests = engine, random.Random(seed), num_requests

    def run(self) -> None:
        for _ in range(self._num_requests):
            params, delivery = self._request()
            try:
                future = self._engine.submit(params, delivery)
            except OverloadedError as error:
                self.num_refused += 1
                assert error.retry_after_s > 0
                if self.accepted:
                    wait([self.accepted[-1][2]], timeout=60)
                continue
            except InvalidRequestError as error:
                assert error.code == "latency_budget_too_small"
                self.num_refused += 1
                continue
            future.add_done_callback(lambda done: self.answers.update([done]))
            self.accepted.append((params, delivery, future))
            if self._random.random() < 0.1:
                self._random.choice(self.accepted[-3:])[2].cancel()
            if len(self.accepted) % 50 == 0:
                self._check_bad_seed(params)

    def _request(self) -> tuple[SamplingParams, Delivery]:
        draw = self._random
        steps, is_auto = draw.randint(1, 4), draw.random() < 0.3
        params = SamplingParams(
            draw.choice(PROMPTS), draw.randrange(20), steps, draw.choice((16, 24)), 16, draw.choice(("full", "tiny"))
        )
        delivery = Delivery(
            latency_budget_ms=draw.choice((None, None, 5.0, 50.0, 500.0)),
            min_inference_steps=1 if is_auto else None,
            strict=draw.random() < 0.05,
            on_preview=(lambda preview: None) if draw.random() < 0.1 else None,
        )
        return params, replace(delivery, draft=True, num_previews=2) if delivery.on_preview else delivery

    def _check_bad_seed(self, params: SamplingParams) -> None:
        with pytest.raises(InvalidRequestError, match="seed is"):
            replace(params, seed=self._random.choice(BAD_SEEDS))  # type: ignore[arg-type]


def resources() -> tuple[int, int, int]:
    """Return the threads, open files and resident KiB of this process."""
    gc.collect()
    resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
    return (
        threading.active_count(),
        len(os.listdir("/proc/self/fd")),
        resident_pages * os.sysconf("SC_PAGESIZE") // 1024,
    )


def storm(engine: DiffusionEngine, num_requests: int, seed: int) -> list[Client]:
    clients = [Client(engine, seed + n, num_requests // NUM_THREADS) for n in range(NUM_THREADS)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
        for _, _, future in client.accepted:
            if not future.cancelled():
                future.exception(timeout=60)
    return clients


@pytest.mark.parametrize("num_requests", [1_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_every_request_is_answered_exactly_once_and_nothing_leaks(tiny_checkpoint: Path, num_requests: int) -> None:
    model = load_model(tiny_checkpoint, device="cpu")
    spoiled = Spoiled(model)
    with DiffusionEngine(replace(model, denoiser=spoiled), EngineConfig(max_live=48)) as engine:
        warm_up_until_clean(engine)
        storm(engine, 400, seed=100)
        before, counted = resources(), vars(engine.stats).copy()
        nan_before = spoiled.num_rows
        clients = storm(engine, num_requests, seed=0)
        counts = {name: value - counted[name] for name, value in vars(engine.stats).items()}
        assert engine.num_live == 0 and engine.is_healthy
        check_answers(model, clients, counts, num_nan=spoiled.num_rows - nan_before)
        del clients
        threads, files, resident_kib = resources()
    assert (threads, files) == before[:2]
    assert resident_kib - before[2] < 60 * 1024, "memory grew with the number of requests"


def warm_up_until_clean(engine: DiffusionEngine) -> None:
    """Repeat the warm-up until it meets no NaN, which fails it."""
    for _ in range(100):
        try:
            return warm_up(engine)
        except NotFiniteError:
            continue
    pytest.fail("every warm-up met a NaN")


def check_answers(model: LoadedModel, clients: list[Client], counts: dict[str, int], num_nan: int) -> None:
    accepted = [item for client in clients for item in client.accepted]
    answers = sum((client.answers for client in clients), Counter[Future[Picture]]())
    assert len(answers) == len(accepted) and set(answers.values()) == {1}
    cancelled = [future for _, _, future in accepted if future.cancelled()]
    failed = [future for _, _, future in accepted if not future.cancelled() and future.exception()]
    assert counts["finished"] + counts["failed"] + counts["cancelled"] == len(accepted)
    assert (counts["cancelled"], counts["failed"]) == (len(cancelled), len(failed))
    assert counts["refused"] == sum(client.num_refused for client in clients)
    assert all(type(future.exception()) is NotFiniteError for future in failed)
    assert 0 < len(failed) <= num_nan
    assert min(counts["finished"], counts["cancelled"], counts["refused"]) > 20
    pictures: dict[SamplingParams, np.ndarray] = {}
    for params, delivery, future in accepted:
        if future.cancelled() or future.exception():
            continue
        made = future.result()
        steps = made.params.num_inference_steps
        assert made.params == replace(params, num_inference_steps=steps)
        assert steps == params.num_inference_steps or (delivery.min_inference_steps or 9) <= steps
        if made.params not in pictures:
            pictures[made.params] = generate(model, made.params)
        away = np.abs(made.pixels.astype(int) - pictures[made.params]).max()
        assert away <= (0 if delivery.strict else MAX_LEVELS_APART)
