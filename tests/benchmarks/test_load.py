"""Closed and open loops against the engine, in this process and over the wire."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from benchmarks.load import Recording, closed_loop, open_loop
from benchmarks.report import figures
from benchmarks.targets import EngineTarget, OpenAITarget, Outcome, Target, http_session, picture_fault, served_models
from benchmarks.workload import Request, Steps, Workload
from tdm_runtime.engine.engine import DiffusionEngine, EngineConfig
from tdm_runtime.model.loaded_model import LoadedModel
from tests.benchmarks.small_server import SmallServer, serving

SIZES = ((16, 16), (24, 16))


def workload(*steps: Steps) -> Workload:
    return Workload(steps=steps, sizes=SIZES)


def over_the_wire(server: SmallServer, use: Callable[[Target], Awaitable[None]]) -> None:
    async def run() -> None:
        async with http_session() as session:
            await use(OpenAITarget(session, server.base_url))

    asyncio.run(run())


async def start_when_refused(engine: DiffusionEngine, recording: Recording, num_refused: int) -> None:
    """Start the engine after `num_refused` refusals: all requests have arrived then, and the others wait."""
    async with asyncio.timeout(30):
        while len(recording.records) < num_refused:
            await asyncio.sleep(0.01)
    engine.start()


def test_a_closed_loop_sends_every_request_once(engine: DiffusionEngine):
    recording = Recording()
    requests = list(itertools.islice(workload(1, 2, 3, 4).requests(), 20))
    asyncio.run(closed_loop(EngineTarget(engine), requests, 4, recording))
    assert sorted(r.request.prompt for r in recording.records) == sorted(r.prompt for r in requests)
    assert all(r.is_completed and r.outcome.steps_used == r.request.num_inference_steps for r in recording.records)
    assert all(r.scheduled_s == r.sent_s for r in recording.records)


def test_a_closed_loop_keeps_to_its_concurrency(engine: DiffusionEngine):
    recording = Recording()
    asyncio.run(closed_loop(EngineTarget(engine), workload(4).requests(), 3, recording, duration_s=0.3))
    for record in recording.records:
        beside = [r for r in recording.records if r.sent_s <= record.sent_s < r.answered_s]
        assert len(beside) <= 3


def test_a_rejected_client_waits_for_retry_after():
    """A client stops if Retry-After is beyond the end of the run."""

    class Refusing:
        async def send(self, request: Request) -> Outcome:
            await asyncio.sleep(0)
            retry_after_s = 0.05 if len(recording.records) < 6 else 60.0
            return Outcome(time.perf_counter(), "429 queue_full", is_refused=True, retry_after_s=retry_after_s)

    recording = Recording()
    asyncio.run(closed_loop(Refusing(), workload(1).requests(), 2, recording, duration_s=30))
    sent_s = sorted(record.sent_s for record in recording.records)
    assert len(sent_s) == 8
    assert all(later - earlier >= 0.05 for earlier, later in zip(sent_s, sent_s[2:], strict=False))


def test_latency_counts_from_the_schedule_if_the_sender_is_late(engine: DiffusionEngine):
    recording = Recording()

    async def run() -> None:
        asyncio.get_running_loop().call_later(0.01, time.sleep, 0.4)  # the sender is busy when requests arrive
        await open_loop(EngineTarget(engine), [0.05, 0.1], workload(1).requests(), recording)

    asyncio.run(run())
    for record in recording.records:
        assert record.sent_s - record.scheduled_s >= 0.25
        assert record.e2el_s > record.sent_s - record.scheduled_s
    assert figures(recording, goodput_ms=250)["goodput_share"] == 0


def test_waiting_for_a_connection_counts_as_latency(engine: DiffusionEngine):
    recording = Recording()
    asyncio.run(open_loop(EngineTarget(engine), [0.0] * 6, workload(4).requests(), recording, max_concurrency=1))
    assert len(recording.records) == 6
    answered = [record.answered_s for record in recording.records]
    assert [record.e2el_s for record in recording.records] == answered == sorted(answered)


def test_the_engine_rejects_requests_beyond_its_bound(tiny_model: LoadedModel):
    recording, engine = Recording(), DiffusionEngine(tiny_model, EngineConfig(max_live=8))

    async def run() -> None:
        starting = asyncio.create_task(start_when_refused(engine, recording, 22))
        await open_loop(EngineTarget(engine), [0.0] * 30, workload(4).requests(), recording)
        await starting

    asyncio.run(run())
    engine.close()
    found = figures(recording)
    assert (found["completed"], found["refused"], found["failed"]) == (8, 22, 0)
    assert found["errors"] == {"OverloadedError": 22}


def test_auto_lets_the_engine_choose_the_steps(engine: DiffusionEngine):
    recording = Recording()
    requests = itertools.islice(workload("auto").requests(), 3)
    asyncio.run(closed_loop(EngineTarget(engine), requests, 1, recording))
    counts = engine.model.recipe.step_counts
    assert all(r.is_completed and r.outcome.steps_used in counts for r in recording.records)


def test_stages_add_up_to_the_round_trip(server: SmallServer):
    recording = Recording()
    requests = list(itertools.islice(workload(1, 4).requests(), 8))
    over_the_wire(server, lambda target: closed_loop(target, requests, 2, recording))
    assert len(recording.records) == 8
    for record in recording.records:
        stages = record.outcome.stages_ms
        assert sum(name.startswith("step ") for name in stages) == record.request.num_inference_steps
        assert sum(stages.values()) == pytest.approx(1e3 * (record.answered_s - record.sent_s), abs=1)
        assert stages["http"] > 0


def test_rejected_and_failed_requests_are_counted_separately_over_the_wire(tiny_model: LoadedModel):
    refused, failed = Recording(), Recording()
    engine = DiffusionEngine(tiny_model, EngineConfig(max_live=8))

    async def use(target: Target) -> None:
        starting = asyncio.create_task(start_when_refused(engine, refused, 12))
        await open_loop(target, [0.0] * 20, workload(4).requests(), refused)
        await starting
        await open_loop(target, [0.0] * 3, workload(99).requests(), failed)

    with serving(engine) as server:
        over_the_wire(server, use)
    engine.close()
    assert figures(refused)["completed"] == 8 and figures(refused)["errors"] == {"429 queue_full": 12}
    assert figures(failed)["errors"] == {"400 invalid_value": 3} and figures(failed)["failed"] == 3


def test_an_unreachable_server_counts_as_failed_requests():
    recording = Recording()

    async def run() -> None:
        async with http_session() as session:
            target = OpenAITarget(session, "http://127.0.0.1:9")
            await open_loop(target, [0.0, 0.0], workload(1).requests(), recording)

    asyncio.run(run())
    assert figures(recording)["failed"] == 2 and not figures(recording)["completed"]


def test_served_models_lists_the_models_of_the_server(server: SmallServer):
    cards = asyncio.run(served_models(server.base_url))
    assert [card["id"] for card in cards] == [server.engine.model.recipe.name]


def test_picture_fault_checks_format_and_size():
    assert picture_fault(b"GIF89a" + bytes(40), (16, 16)) == "not_a_png"
    header = b"\x89PNG\r\n\x1a\n" + bytes(8) + (16).to_bytes(4, "big") + (24).to_bytes(4, "big")
    assert picture_fault(header, (16, 24)) is None
    assert picture_fault(header, (24, 16)) == "wrong_size"


def test_edits_start_from_another_picture_each_and_show_its_stage(engine: DiffusionEngine) -> None:
    recording = Recording()
    edits = replace(workload(4), strength=0.5)
    first, second = itertools.islice(edits.requests(), 2)
    assert first.given_pixels().shape[2] == 3
    assert first.given_pixels().tobytes() != second.given_pixels().tobytes()
    asyncio.run(closed_loop(EngineTarget(engine), itertools.islice(edits.requests(), 3), 1, recording))
    assert len(recording.records) == 3
    for record in recording.records:
        assert record.outcome.stages_ms["image"] > 0
        assert [name for name in record.outcome.stages_ms if name.startswith("step")] == ["step 1", "step 2"]
