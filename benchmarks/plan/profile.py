"""Measures the cost table of a model that this machine runs."""

from __future__ import annotations

import asyncio
import itertools
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from benchmarks.load import Recording, closed_loop
from benchmarks.machine import environment
from benchmarks.plan.cost_table import CostTable, SizeCosts
from benchmarks.targets import EngineTarget, OpenAITarget, http_session
from benchmarks.workload import Workload
from tdm_runtime.engine.engine import DiffusionEngine
from tdm_runtime.engine.intake import call_kind
from tdm_runtime.media.image_file import encode_image
from tdm_runtime.params import SamplingParams
from tdm_runtime.scheduling.cost_model import CostModel, Kind

MOST_IN_FLIGHT = 16
LONE_REQUESTS = 20
"""Requests, one at a time, whose median way outside the engine is `CostTable.front_s`."""
MOST_PACES = 2000
"""Calls whose durations a table keeps."""


class RecordedCosts(CostModel):
    """Cost model that keeps every call it learned from."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Kind, int, float]] = []
        """Kind, samples and seconds of each call, in order."""

    def observe(self, kind: Kind, size: int, seconds: float, now_s: float, is_calm: bool = False) -> None:
        """Keep the call, and learn from it."""
        self.calls.append((kind, size, seconds))
        super().observe(kind, size, seconds, now_s, is_calm)


def profile(engine: DiffusionEngine, costs: RecordedCosts, seconds: float, base_url: str | None = None) -> CostTable:
    """Measure a cost table: the warm-up's costs as they are after some seconds of load.

    Args:
        engine: A running, warmed-up engine.
        costs: The engine's costs.
        seconds: Duration of a load of 1, 4, then 16 requests in flight of all step counts, then 16 of the fewest steps.
        base_url: Server whose way to the client is measured too; None measures the way through this process.
    """
    model, recipe = engine.model, engine.model.recipe
    workload = Workload(steps=recipe.step_counts, sizes=recipe.native_sizes, tag=f"profile {time.time_ns()}")
    _pictures_per_second(engine, workload, 1, seconds / 4)
    costs.calls.clear()
    for in_flight in (4, MOST_IN_FLIGHT):
        _pictures_per_second(engine, workload, in_flight, seconds / 4)
    paces = paces_of(costs.calls)
    quickest = replace(workload, steps=recipe.step_counts[:1], sizes=recipe.native_sizes[:1])
    rate = _pictures_per_second(engine, quickest, MOST_IN_FLIGHT, seconds / 4)
    front_s = asyncio.run(_front_s(engine, base_url))
    costs.pass_time(time.monotonic())
    sizes, deviations = {}, []
    for width, height in recipe.native_sizes:
        shape = model.latent_shape(SamplingParams("a red heart", 0, recipe.default_steps, width, height))
        denoise = call_kind(model, "denoise", shape)
        decode = call_kind(model, "decode:full", model.decoders["full"].calls(shape).shape)
        most = engine.config.max_batch_size
        sizes[f"{width}x{height}"] = SizeCosts(_batches(costs, denoise, most), _batches(costs, decode, most))
        deviations.append(costs.deviation(denoise))
    pixels = engine.submit(SamplingParams("a red heart", 0, recipe.default_steps, *recipe.native_sizes[0])).result()
    began_s = time.perf_counter()
    encode_image(pixels.pixels, "png")
    encode_s = time.perf_counter() - began_s
    table = CostTable(
        name=recipe.name,
        machine=str(environment()),
        source=f"measured with {model.backend}",
        step_counts=recipe.step_counts,
        sizes=sizes,
        text_s=_batches(costs, call_kind(model, "text"), engine.config.max_batch_size),
        encode_s=encode_s,
        front_s=front_s,
        deviation=statistics.fmean(deviations),
        paces=tuple(paces[-MOST_PACES:]),
        default_steps=recipe.default_steps,
    )
    return replace(table, overhead_s=max(0.0, 1 / rate - 1 / table.capacity(recipe.step_counts[0])))


def paces_of(calls: Sequence[tuple[Kind, int, float]]) -> list[float]:
    """Return each call's duration as a multiple of the mean of its kind and size, in the order of the calls."""
    seconds = defaultdict[tuple[Kind, int], list[float]](list)
    for kind, size, call_s in calls:
        seconds[kind, size].append(call_s)
    means = {one: statistics.fmean(all_s) for one, all_s in seconds.items()}
    return [call_s / means[kind, size] for kind, size, call_s in calls]


def _pictures_per_second(engine: DiffusionEngine, workload: Workload, in_flight: int, seconds: float) -> float:
    recording = Recording()
    asyncio.run(closed_loop(EngineTarget(engine), workload.requests(), in_flight, recording, seconds))
    return sum(record.is_completed for record in recording.records) / recording.duration_s


async def _front_s(engine: DiffusionEngine, base_url: str | None) -> float:
    """Return the median seconds of lone requests outside the engine's stages."""
    recording, workload = Recording(), Workload(steps=(1,), tag=f"way {time.time_ns()}")
    requests = itertools.islice(workload.requests(), LONE_REQUESTS)
    if base_url is None:
        await closed_loop(EngineTarget(engine), requests, 1, recording)
    else:
        async with http_session() as session:
            await closed_loop(OpenAITarget(session, base_url), requests, 1, recording)
    outside_ms = [
        sum(record.outcome.stages_ms.get(stage, 0.0) for stage in ("engine hand-over", "http"))
        for record in recording.records
        if record.is_completed
    ]
    if not outside_ms:
        raise ConnectionError(f"{base_url} answered none of {LONE_REQUESTS} requests; start the server first")
    return max(0.0, 1e-3 * statistics.median(outside_ms))


def _batches(costs: CostModel, kind: Kind, most: int) -> dict[int, float]:
    """Return the seconds of the batch sizes that help."""
    largest = costs.batch_size(kind, most)
    return {1 << n: costs.seconds(kind, 1 << n) for n in range(int(math.log2(largest)) + 1)}
