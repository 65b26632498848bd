"""Thread counts are checked again in service: only while nobody asks, on the engine's thread, and never against it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from serving.images import thread_watch
from serving.images.thread_watch import ThreadWatch
from tdm_runtime.checkpoint.folder import open_checkpoint
from tdm_runtime.engine.engine import DiffusionEngine
from tdm_runtime.errors import BackendError
from tdm_runtime.model.artifacts import BackendConfig
from tdm_runtime.model.choice import load_model
from tdm_runtime.params import SamplingParams
from tests.serving.conftest import wait_until

SENTENCE = "it runs on openvino fp32 with 1 thread, and with 2 it is 1.50 times as fast now; the next start uses them"


class FakeCheck:
    """A check that notes on which threads its rounds run, and beside how many pictures."""

    def __init__(self, engine: DiffusionEngine) -> None:
        self.engine = engine
        self.rounds: list[tuple[str, int]] = []

    def round(self) -> None:
        self.rounds.append((threading.current_thread().name, self.engine.num_live))

    def better(self) -> str | None:
        return SENTENCE


@pytest.fixture
def engine(tiny_checkpoint: Path) -> Iterator[DiffusionEngine]:
    with DiffusionEngine(load_model(tiny_checkpoint, BackendConfig("torch"))) as running:
        yield running


@pytest.fixture
def watch(
    engine: DiffusionEngine, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[object], ThreadWatch]]:
    """Start a watch whose checks come from a function. It is closed at the end."""
    started: list[ThreadWatch] = []

    def start(check_of: object) -> ThreadWatch:
        monkeypatch.setattr(thread_watch, "POLL_S", 0.01)
        monkeypatch.setattr(thread_watch, "IDLE_S", 0.3)
        monkeypatch.setattr(thread_watch.ThreadCheck, "of", check_of)
        started.append(ThreadWatch(engine, [open_checkpoint(tiny_checkpoint)], BackendConfig("auto")))
        return started[0]

    yield start
    for one in started:
        one.close()


def test_a_better_count_is_found_on_the_engines_thread_and_logged(
    engine: DiffusionEngine, watch: Callable[[object], ThreadWatch], caplog: pytest.LogCaptureFixture
) -> None:
    check = FakeCheck(engine)
    with caplog.at_level(logging.WARNING, thread_watch.logger.name):
        watch(lambda checkpoint, config: check)
        wait_until(lambda: caplog.messages)
    assert check.rounds == [("diffusion-engine", 0)] * thread_watch.ROUNDS
    assert [message.partition(": ")[2] for message in caplog.messages] == [SENTENCE]


def test_a_check_waits_until_no_picture_is_asked_for_any_more(
    engine: DiffusionEngine, watch: Callable[[object], ThreadWatch]
) -> None:
    check = FakeCheck(engine)
    futures = [engine.submit(SamplingParams("a cat", seed, 4, 16, 16)) for seed in range(60)]
    watch(lambda checkpoint, config: check)
    wait_until(lambda: futures[-2].done())
    submitted_s = time.monotonic()
    engine.submit(SamplingParams("a cat", 60, 4, 16, 16)).result()
    wait_until(lambda: check.rounds)
    assert time.monotonic() - submitted_s >= thread_watch.IDLE_S
    assert check.rounds[0] == ("diffusion-engine", 0)
    assert engine.stats.finished == 61


def test_a_check_that_fails_is_logged_and_the_server_goes_on(
    engine: DiffusionEngine, watch: Callable[[object], ThreadWatch], caplog: pytest.LogCaptureFixture
) -> None:
    def broken(checkpoint: object, config: object) -> None:
        raise BackendError("no memory")

    with caplog.at_level(logging.WARNING, thread_watch.logger.name):
        watch(broken)
        wait_until(lambda: caplog.messages)
    assert "could not be checked: no memory" in caplog.text
    assert engine.submit(SamplingParams("a cat", 1, 1, 16, 16)).result().pixels.shape == (16, 16, 3)


def test_closing_does_not_wait_for_idleness(watch: Callable[[object], ThreadWatch]) -> None:
    running = watch(lambda checkpoint, config: None)
    started_s = time.monotonic()
    running.close()
    assert time.monotonic() - started_s < 10
    assert not running._thread.is_alive()
