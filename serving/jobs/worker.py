"""Runs jobs in the replica, in the time that requests leave."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from serving.errors import from_exception, retry_after_s
from serving.jobs.artifacts import ArtifactStore
from serving.jobs.job import FinishedPart, Job, JobKind, LeaseLostError, Part
from serving.jobs.store import JobStore
from serving.telemetry.metrics import ServerMetrics

logger = logging.getLogger(__name__)

MAX_RUNNING = 2
"""Jobs at once: a short one need not wait for a long one."""
MAX_IN_FLIGHT = 8
"""Pictures of one job in the engine at once: enough for full batches, few beside what it admits."""
POLL_S = 1.0
"""Between two looks for jobs that other servers accepted, or lost."""
SWEEP_S = 60.0
MAX_RETRY_S = 2.0


class Renderer(Protocol):
    """What makes jobs of one kind."""

    def num_pictures(self, part: Part) -> int:
        """How many the engine has at once, while a part is made."""

    async def make(self, job: Job, part: Part) -> FinishedPart:
        """Make one part.

        Raises:
            Exception: not now, where `retry_after_s` knows when; the job failed, elsewhere.
        """

    def finish(self, job: Job, parts: Callable[[], Iterator[FinishedPart]]) -> dict[str, Any]:
        """Make of all parts what the job is for; blocks. Returns the job's result.

        Args:
            parts: yields them from the first, each time it is called.
        """

    def discard(self, result: Mapping[str, Any]) -> None:
        """Delete what a result names; blocks."""


class JobWorker:
    """Claims jobs and makes them, until it is stopped. Belongs to one event loop."""

    def __init__(
        self,
        store: JobStore,
        artifacts: ArtifactStore,
        renderers: Mapping[JobKind, Renderer],
        models: Callable[[], Sequence[str]],
        metrics: ServerMetrics,
    ) -> None:
        """
        Args:
            models: what is served just now; jobs of others are left to others.
        """
        self._store = store
        self._artifacts = artifacts
        self._renderers = renderers
        self._models = models
        self._metrics = metrics
        self._name = f"{socket.gethostname()[:24]}:{os.getpid()}"
        self._running: dict[str, asyncio.Task[None]] = {}
        self._loops: list[asyncio.Task[None]] = []
        self._sweeping: asyncio.Task[None] | None = None
        self._woken = asyncio.Event()
        self._is_stopping = False

    def start(self) -> None:
        """Look for jobs from now on."""
        self._loops = [asyncio.create_task(self._run()) for _ in range(MAX_RUNNING)]
        self._sweeping = asyncio.create_task(self._sweep())

    async def stop(self) -> None:
        """Give back what is running, for another server to go on with; return when that is on the disk."""
        self._is_stopping = True
        self._woken.set()
        for task in [*self._running.values(), *([self._sweeping] if self._sweeping else [])]:
            task.cancel()
        await asyncio.gather(*self._loops)

    def wake(self) -> None:
        """Say that there is a job."""
        self._woken.set()

    def drop(self, job_id: str) -> None:
        """Stop making a job that was cancelled or deleted. Elsewhere, its worker finds out at its next part."""
        if task := self._running.get(job_id):
            task.cancel()

    async def _run(self) -> None:
        while not self._is_stopping:
            try:
                job = await asyncio.to_thread(self._store.claim, self._name, self._models())
                if job is None:
                    await self._wait()
                else:
                    await self._hold(job)
            except Exception:
                logger.exception("the queue of jobs cannot be used now; it is tried again")
                await asyncio.sleep(POLL_S)

    async def _wait(self) -> None:
        try:
            await asyncio.wait_for(self._woken.wait(), POLL_S)
            self._woken.clear()
        except TimeoutError:
            return

    async def _hold(self, job: Job) -> None:
        """Make a job under its lease; give it back where the server stops."""
        task = asyncio.create_task(self._work(job))
        self._running[job.id] = task
        if self._is_stopping:
            task.cancel()
        await asyncio.wait({task})
        del self._running[job.id]
        if self._is_stopping:
            await asyncio.to_thread(self._store.release, job)  # changes nothing where it has ended
        if not task.cancelled():
            task.result()

    async def _work(self, job: Job) -> None:
        """Make a job for as long as the lease is renewed."""
        tasks = [asyncio.create_task(work) for work in (self._make(job), self._renew(job))]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            making, renewing = await asyncio.gather(*tasks, return_exceptions=True)
        if isinstance(making, LeaseLostError) or isinstance(renewing, LeaseLostError):
            logger.info("job %s was cancelled, or is another's now", job.id)
        elif isinstance(making, Exception):
            await self._fail(job, making)
        elif making is None:
            self._metrics.jobs.labels(job.kind, "completed").inc()

    async def _fail(self, job: Job, error: Exception) -> None:
        told = from_exception(error)
        if told.code == "internal_error":
            logger.error("job %s failed", job.id, exc_info=error)
        try:
            await asyncio.to_thread(self._store.fail, job, told.code or "internal_error", told.message)
        except LeaseLostError:
            return
        self._metrics.jobs.labels(job.kind, "failed").inc()

    async def _renew(self, job: Job) -> None:
        while True:
            await asyncio.sleep(self._store.lease_s / 3)
            await asyncio.to_thread(self._store.renew, job)

    async def _make(self, job: Job) -> None:
        renderer = self._renderers[job.kind]
        await self._make_parts(job, renderer)
        result = await asyncio.to_thread(renderer.finish, job, lambda: self._store.finished_parts(job))
        try:
            await asyncio.to_thread(self._store.complete, job, result)
        except LeaseLostError:
            await asyncio.to_thread(renderer.discard, result)
            raise

    async def _make_parts(self, job: Job, renderer: Renderer) -> None:
        """Make what is missing, a few pictures at a time."""
        making: dict[asyncio.Task[None], int] = {}
        try:
            for part in await asyncio.to_thread(self._store.unfinished_parts, job):
                while making and sum(making.values()) + renderer.num_pictures(part) > MAX_IN_FLIGHT:
                    await _collect(making)
                making[asyncio.create_task(self._make_part(job, renderer, part))] = renderer.num_pictures(part)
            while making:
                await _collect(making)
        finally:
            for task in making:
                task.cancel()
            await asyncio.gather(*making, return_exceptions=True)

    async def _make_part(self, job: Job, renderer: Renderer, part: Part) -> None:
        while True:
            try:
                made = await renderer.make(job, part)
                break
            except Exception as error:
                if (wait_s := retry_after_s(error)) is None:
                    raise
                await asyncio.sleep(min(wait_s, MAX_RETRY_S))
        await asyncio.to_thread(self._store.save, job, made)

    async def _sweep(self) -> None:
        while True:
            try:
                await asyncio.to_thread(self._store.expire)
                await asyncio.to_thread(self._artifacts.sweep)
            except Exception:
                logger.exception("what has expired could not be deleted; it is tried again")
            await asyncio.sleep(SWEEP_S)


async def _collect(making: dict[asyncio.Task[None], int]) -> None:
    """Wait until one is done; raise what it raised."""
    done, _ = await asyncio.wait(making, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        del making[task]
        task.result()
