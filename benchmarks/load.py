"""Closed and open loops. Both write into a `Recording`, so that an interrupted run keeps its results."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

from benchmarks.targets import Outcome, Target
from benchmarks.workload import Request

MAX_WAIT_S = 60.0
"""Longest wait after a rejection, even if Retry-After is longer."""


@dataclass(frozen=True)
class Record:
    """One request that was answered, was rejected or failed. Times are seconds since the start of the run."""

    request: Request
    scheduled_s: float
    """Arrival time: in an open loop the scheduled time, in a closed loop the time of sending."""
    sent_s: float
    answered_s: float
    outcome: Outcome

    @property
    def e2el_s(self) -> float:
        """Latency, in seconds. It counts from the scheduled arrival, so that a late sender hides no delay."""
        return self.answered_s - self.scheduled_s

    @property
    def is_completed(self) -> bool:
        return self.outcome.error is None


@dataclass
class Recording:
    """Records of one run so far."""

    records: list[Record] = field(default_factory=list)

    @property
    def duration_s(self) -> float:
        """Seconds from the start to the last answer."""
        return max((record.answered_s for record in self.records), default=0.0)


async def closed_loop(
    target: Target,
    requests: Iterable[Request],
    concurrency: int,
    recording: Recording,
    duration_s: float | None = None,
) -> None:
    """Keep `concurrency` requests in flight until `requests` ends or `duration_s` is over.

    After a rejection, a client waits for Retry-After before its next request, as the official client does.

    Raises:
        ValueError: `concurrency` is below 1.
    """
    if concurrency < 1:
        raise ValueError(f"concurrency is {concurrency}; it must be at least 1")
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
    """Send each request at its arrival time, without waiting for earlier answers; then wait for all answers.

    Args:
        arrivals: seconds since the start, in rising order.
        max_concurrency: most requests in flight; the others wait, and the wait counts as latency.
    """
    gate = nullcontext() if max_concurrency is None else asyncio.Semaphore(max_concurrency)
    started_s = time.perf_counter()

    async def client(request: Request, scheduled_s: float) -> None:
        async with gate:
            sent_s = time.perf_counter() - started_s
            outcome = await target.send(request)
            recording.records.append(Record(request, scheduled_s, sent_s, outcome.answered_s - started_s, outcome))

    async with asyncio.TaskGroup() as clients:
        for scheduled_s, request in zip(arrivals, requests, strict=False):  # `requests` may be endless
            delay_s = scheduled_s - (time.perf_counter() - started_s)
            if delay_s > 0:
                await asyncio.sleep(delay_s)
            clients.create_task(client(request, scheduled_s))
