"""Closed and open loops. Both write what happened into a `Recording`, which an interrupted run keeps."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

from benchmarks.targets import Outcome, Target
from benchmarks.workload import Request

MAX_WAIT_S = 60.0
"""However much later a refusal says to come back."""


@dataclass(frozen=True)
class Record:
    """One request that was answered, refused or failed. Times are seconds after the start of the run."""

    request: Request
    scheduled_s: float
    """When it arrived: by the schedule of an open loop, when it was sent in a closed one."""
    sent_s: float
    answered_s: float
    outcome: Outcome

    @property
    def e2el_s(self) -> float:
        """Latency: counted from the scheduled arrival, so that a late sender hides no delay."""
        return self.answered_s - self.scheduled_s

    @property
    def is_completed(self) -> bool:
        return self.outcome.error is None


@dataclass
class Recording:
    """What one run measured so far."""

    records: list[Record] = field(default_factory=list)

    @property
    def duration_s(self) -> float:
        """From the start to the last answer."""
        return max((record.answered_s for record in self.records), default=0.0)


async def closed_loop(
    target: Target,
    requests: Iterable[Request],
    concurrency: int,
    recording: Recording,
    duration_s: float | None = None,
) -> None:
    """Keep `concurrency` requests in flight until they run out or `duration_s` is over.

    Who is refused sends the next when the refusal says to come back, as the official client does.

    Raises:
        ValueError: a concurrency below 1.
    """
    if concurrency < 1:
        raise ValueError(f"the concurrency is {concurrency}; it must be at least 1")
    waiting = iter(requests)
    started_s = time.perf_counter()

    async def client() -> None:
        for request in waiting:
            sent_s = time.perf_counter() - started_s
            outcome = await target.send(request)
            recording.records.append(Record(request, sent_s, sent_s, outcome.answered_s - started_s, outcome))
            wait_s = min(outcome.retry_after_s, MAX_WAIT_S)
            if duration_s is not None and time.perf_counter() - started_s + wait_s >= duration_s:
                return
            if wait_s:
                await asyncio.sleep(wait_s)

    async with asyncio.TaskGroup() as clients:
        for _ in range(concurrency):
            clients.create_task(client())


async def open_loop(
    target: Target,
    arrivals: Sequence[float],
    requests: Iterable[Request],
    recording: Recording,
    max_concurrency: int | None = None,
) -> None:
    """Send each request at its arrival, whether earlier ones were answered or not, and wait for all.

    Args:
        arrivals: seconds after the start, rising.
        max_concurrency: hold requests back beyond so many; their waiting counts as latency.
    """
    gate = nullcontext() if max_concurrency is None else asyncio.Semaphore(max_concurrency)
    started_s = time.perf_counter()

    async def client(request: Request, scheduled_s: float) -> None:
        async with gate:
            sent_s = time.perf_counter() - started_s
            outcome = await target.send(request)
            recording.records.append(Record(request, scheduled_s, sent_s, outcome.answered_s - started_s, outcome))

    async with asyncio.TaskGroup() as clients:
        for scheduled_s, request in zip(arrivals, requests, strict=False):  # requests may be endless
            delay_s = scheduled_s - (time.perf_counter() - started_s)
            if delay_s > 0:
                await asyncio.sleep(delay_s)
            clients.create_task(client(request, scheduled_s))
