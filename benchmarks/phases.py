"""Measurements of `tdm-bench compare`: of one target, and of the engine in this process."""

from __future__ import annotations

import copy
import itertools
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.load import Recording, closed_loop, open_loop
from benchmarks.report import Figures, figures
from benchmarks.targets import EngineTarget, OpenAITarget, Target, http_session, running_engine, served_models
from benchmarks.workload import Size, Workload, arrivals_within
from tdm_runtime.engine.engine import DiffusionEngine, EngineConfig
from tdm_runtime.model.loaded_model import LoadedModel

STEPS = 4
"""Step count of every contender in the tests with a fixed step count."""
SLO_FACTOR = 3.0
"""SLO as a multiple of the peer's own unloaded latency."""
JOINING_LOAD = 0.6
"""Arrival rate as a share of the throughput of whole-request batching."""
TURNS = 3
"""Turns that the two engines of `joining` take."""
LARGE_SIDE = 3
"""Side of a large picture, as a multiple of the side of a small one."""
SMALL_TO_LARGE = 10
"""One picture in this number is large."""


@dataclass(frozen=True)
class Plan:
    """Lengths and sizes of the measurements."""

    size: Size
    """Size of every requested picture, in pixels."""
    seed: int = 0
    budget_factor: float = 0.85
    """Latency budget of our server as a share of the SLO; the rest is for HTTP and the client."""
    latency_pictures: int = 30
    concurrencies: tuple[int, ...] = (4, 8, 16)
    load_s: float = 8.0
    """Duration of each closed loop."""
    warm_up_s: float = 2.0
    arrivals_s: float = 10.0
    """Duration of the schedule of each open loop."""
    overhead_pictures: int = 200
    quality_pictures: int = 32

    @classmethod
    def quick(cls, size: Size, seed: int, budget_factor: float) -> Plan:
        """Return a short plan that only shows that everything runs; its figures mean nothing."""
        return cls(size, seed, budget_factor, 5, (4, 16), 0.7, 0.5, 1.0, 10, 2)

    def workload(self, *steps: int | str, budget_ms: float | None = None) -> Workload:
        """Return requests of this size whose prompts are in no text cache."""
        mixture: Any = steps
        return Workload(self.seed, mixture, (self.size,), budget_ms, tag=secrets.token_hex(2))


@dataclass(frozen=True)
class Scenario:
    """One open loop of the comparison within an SLO."""

    load: float
    """Arrival rate as a share of the peer's saturation throughput."""
    burstiness: float = 1.0


SCENARIOS = (Scenario(0.8), Scenario(1.2), Scenario(2.0), Scenario(1.2, burstiness=0.25))


class NothingMeasuredError(Exception):
    """Error: every request failed. The message names the errors."""


async def measure_server(base_url: str, plan: Plan) -> dict[str, Any]:
    """Return `unloaded_and_saturated` over the wire, with the model and backend that the server reports."""
    cards = await served_models(base_url)
    served = {name: cards[0][name] for name in ("id", "backend", "digest") if name in cards[0]} if cards else {}
    async with http_session() as session:
        return {"served": served, **await unloaded_and_saturated(OpenAITarget(session, base_url), plan)}


async def measure_engine(model: LoadedModel, plan: Plan) -> dict[str, Any]:
    """Return `unloaded_and_saturated` of the engine in this process."""
    served = {"id": model.recipe.name, "backend": model.backend, "digest": model.digest}
    with running_engine(model) as engine:
        return {"served": served, **await unloaded_and_saturated(EngineTarget(engine), plan)}


async def unloaded_and_saturated(target: Target, plan: Plan) -> dict[str, Any]:
    """Measure latency of one request at a time, then throughput with many in flight, all at `STEPS` steps.

    Raises:
        NothingMeasuredError: no request was answered.
    """
    await closed_loop(target, plan.workload(STEPS).requests(), max(plan.concurrencies), Recording(), plan.warm_up_s)
    alone = Recording()
    await closed_loop(target, itertools.islice(plan.workload(STEPS).requests(), plan.latency_pictures), 1, alone)
    unloaded = figures(alone)
    if not unloaded["completed"]:
        raise NothingMeasuredError(f"every request failed: {unloaded['errors']}")
    loads: dict[str, Figures] = {}
    for concurrency in plan.concurrencies:
        recording = Recording()
        await closed_loop(target, plan.workload(STEPS).requests(), concurrency, recording, plan.load_s)
        loads[str(concurrency)] = figures(recording)
    best = max(loads, key=lambda concurrency: float(loads[concurrency]["request_throughput"]))
    return {
        "unloaded_ms": unloaded["median_e2el_ms"],
        "throughput": loads[best]["request_throughput"],
        "best_concurrency": int(best),
        "unloaded": unloaded,
        "loads": loads,
    }


# -- within an SLO ----------------------------------------------------------------------------


def slo_of(peer: dict[str, Any]) -> float:
    """Return the SLO in milliseconds, from the peer's own unloaded latency."""
    return SLO_FACTOR * float(peer["unloaded_ms"])


async def peer_within_slo(base_url: str, peer: dict[str, Any], plan: Plan) -> list[Figures]:
    """Measure a peer at a fixed step count, with one result per scenario."""
    return [
        await scenario_within_slo(base_url, peer, plan, scenario, plan.workload(STEPS), warm_up=True)
        for scenario in SCENARIOS
    ]


async def ours_within_slo(base_url: str, peer: dict[str, Any], plan: Plan) -> tuple[list[Figures], list[Figures]]:
    """Measure our server on the peer's schedules: with automatic steps, and at the peer's step count."""
    budget_ms = plan.budget_factor * slo_of(peer)
    auto, fixed = [], []
    for scenario in SCENARIOS:
        asked = plan.workload("auto", budget_ms=budget_ms)
        auto.append(await scenario_within_slo(base_url, peer, plan, scenario, asked, warm_up=True))
        asked = plan.workload(STEPS, budget_ms=budget_ms)
        fixed.append(await scenario_within_slo(base_url, peer, plan, scenario, asked, warm_up=False))
    return auto, fixed


async def scenario_within_slo(
    base_url: str, peer: dict[str, Any], plan: Plan, scenario: Scenario, workload: Workload, warm_up: bool
) -> Figures:
    """Measure requests that arrive at random, at a share of what the peer makes, within its SLO.

    Args:
        peer: Its "throughput" in pictures a second and "unloaded_ms".
        warm_up: Whether a short closed loop comes first.
    """
    rate = scenario.load * float(peer["throughput"])
    arrivals = arrivals_within(plan.arrivals_s, rate, scenario.burstiness, plan.seed)
    recording = Recording()
    async with http_session() as session:
        target = OpenAITarget(session, base_url)
        if warm_up:
            await closed_loop(target, plan.workload(STEPS).requests(), 4, Recording(), plan.warm_up_s)
        await open_loop(target, arrivals, workload.requests(), recording)
    return figures(recording, slo_of(peer))


# -- joining mid-flight -----------------------------------------------------------------------


async def joining(model: LoadedModel, plan: Plan) -> dict[str, Any]:
    """Compare joining a running batch with whole-request batching, on the same arrivals with mixed step counts.

    Both engines start with the same learned costs, and they take turns.
    """
    mixture: Sequence[int] = model.recipe.step_counts
    with running_engine(model) as engine:
        costs = engine.costs
    saturated = Recording()
    with (
        DiffusionEngine(model, EngineConfig(joining=False), costs=copy.deepcopy(costs)) as whole,
        DiffusionEngine(model, EngineConfig(joining=True), costs=copy.deepcopy(costs)) as joined,
    ):
        engines = {"whole": whole, "joining": joined}
        for each in engines.values():
            await closed_loop(EngineTarget(each), plan.workload(*mixture).requests(), 16, Recording(), plan.warm_up_s)
        await closed_loop(EngineTarget(whole), plan.workload(*mixture).requests(), 16, saturated, plan.load_s)
        rate = JOINING_LOAD * float(figures(saturated)["request_throughput"])
        before = {name: _counts(each) for name, each in engines.items()}
        recordings = {name: Recording() for name in engines}
        for turn in range(TURNS):
            arrivals = arrivals_within(plan.arrivals_s / TURNS, rate, seed=plan.seed + turn)
            for name, each in engines.items():
                requests = replace(plan.workload(*mixture), seed=plan.seed + turn).requests()
                await open_loop(EngineTarget(each), arrivals, requests, recordings[name])
    found: dict[str, Any] = {"rate": rate}
    for name, each in engines.items():
        steps, sample_steps = (now - then for now, then in zip(_counts(each), before[name], strict=True))
        found[name] = figures(recordings[name]) | {"mean_batch_size": sample_steps / max(1, steps)}
    return found


# -- large pictures beside small ones ---------------------------------------------------------


async def isolation(model: LoadedModel, plan: Plan) -> dict[str, Any]:
    """Measure the latency of small pictures alone, and mixed with large ones: joining, and batched as whole requests.

    The checkpoint was not trained at the large size, so large pictures look wrong; only their time matters.
    """
    width, height = plan.size
    large = (LARGE_SIDE * width, LARGE_SIDE * height)
    model = replace(model, recipe=replace(model.recipe, native_sizes=(plan.size, large)))
    with running_engine(model) as engine:
        costs = engine.costs
    mixture = replace(plan.workload(STEPS), sizes=(plan.size,) * (SMALL_TO_LARGE - 1) + (large,))
    found: dict[str, Any] = {}
    rate = 0.0
    for name, joins, workload in (
        ("whole requests", False, mixture),
        ("joining", True, mixture),
        ("small ones alone", True, plan.workload(STEPS)),
    ):
        with DiffusionEngine(model, EngineConfig(joining=joins), costs=copy.deepcopy(costs)) as engine:
            target = EngineTarget(engine)
            if not rate:
                saturated = Recording()
                await closed_loop(target, workload.requests(), 8, saturated, plan.load_s)
                rate = JOINING_LOAD * float(figures(saturated)["request_throughput"])
            everything, small = Recording(), Recording()
            await open_loop(
                target, arrivals_within(plan.arrivals_s, rate, seed=plan.seed), workload.requests(), everything
            )
            small.records = [record for record in everything.records if record.request.size == plan.size]
            found[name] = figures(small)
    return {"rate": rate, "large": large, "small_to_large": SMALL_TO_LARGE, "runs": found}


def _counts(engine: DiffusionEngine) -> tuple[int, int]:
    return engine.stats.steps, engine.stats.sample_steps
