"""Worker that runs jobs in the replica, in the time that requests leave free."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from serving.errors import from_exception, made_when_free
from serving.jobs.artifacts import ArtifactStore
from serving.jobs.job import FinishedPart, Job, JobKind, LeaseLostError, Part
from serving.jobs.store import JobStore
from serving.telemetry.metrics import ServerMetrics

logger = logging.getLogger(__name__)

MAX_RUNNING = 2
"""Most jobs at once. With two, a short job need not wait for a long one."""
MAX_IN_FLIGHT = 8
"""Most pictures of one job in the engine at once: enough for full batches, few beside the engine's limit."""
POLL_S = 1.0
"""Time between two looks for jobs that other servers accepted or lost, in seconds."""
SWEEP_S = 60.0


class Renderer(Protocol):
    """Makes jobs of one kind."""

    def num_pictures(self, part: Part) -> int:
        """Return the number of pictures that a part has in the engine at once."""

    async def make(self, job: Job, part: Part) -> FinishedPart:
        """Make one part.

        Raises:
            Exception: the part is tried again if `retry_after_s` returns a time; otherwise the job fails.
        """

    def finish(self, job: Job, parts: Callable[[], Iterator[FinishedPart]]) -> dict[str, Any]:
        """Make the files of the job from its parts. Blocks. Returns the job's result.

        Args:
            parts: returns an iterator over all parts, at each call.
        """

    def discard(self, result: Mapping[str, Any]) -> None:
        """Delete the files of a result. Blocks."""


class JobWorker:
    """Claims jobs and makes them until it is stopped. Belongs to one event loop."""

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
            models: returns the names of the served models. Jobs of other models are left to other servers.
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
        """Begin to look for jobs."""
        self._loops = [asyncio.create_task(self._run()) for _ in range(MAX_RUNNING)]
        self._sweeping = asyncio.create_task(self._sweep())

    async def stop(self) -> None:
        """Give running jobs back, so that another server can continue them. Return when that is on the disk."""
        self._is_stopping = True
        self._woken.set()
        for task in [*self._running.values(), *([self._sweeping] if self._sweeping else [])]:
            task.cancel()
        await asyncio.gather(*self._loops)

    def wake(self) -> None:
        """Look for a job now."""
        self._woken.set()

    def drop(self, job_id: str) -> None:
        """Stop making a job that was cancelled or deleted. A worker of another server notices at its next part."""
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
                logger.exception("the queue of jobs cannot be used now; trying again")
                await asyncio.sleep(POLL_S)

    async def _wait(self) -> None:
        try:
            await asyncio.wait_for(self._woken.wait(), POLL_S)
            self._woken.clear()
        except TimeoutError:
            return

    async def _hold(self, job: Job) -> None:
        """Make a job under its lease. Give it back if the server stops."""
        task = asyncio.create_task(self._work(job))
        self._running[job.id] = task
        if self._is_stopping:
            task.cancel()
        await asyncio.wait({task})
        del self._running[job.id]
        if self._is_stopping:
            await asyncio.to_thread(self._store.release, job)  # no effect on an ended job
        if not task.cancelled():
            task.result()

    async def _work(self, job: Job) -> None:
        """Make a job while its lease is renewed."""
        tasks = [asyncio.create_task(work) for work in (self._make(job), self._renew(job))]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            making, renewing = await asyncio.gather(*tasks, return_exceptions=True)
        if isinstance(making, LeaseLostError) or isinstance(renewing, LeaseLostError):
            logger.info("job %s was cancelled or deleted, or another server has claimed it", job.id)
        elif isinstance(making, Exception):
            await self._fail(job, making)
        elif making is None:
            self._metrics.jobs.labels(job.kind, "completed").inc()

    async def _fail(self, job: Job, error: Exception) -> None:
        failure = from_exception(error)
        if failure.code == "internal_error":
            logger.error("job %s failed", job.id, exc_info=error)
        try:
            await asyncio.to_thread(self._store.fail, job, failure.code or "internal_error", failure.message)
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
        """Make the missing parts, a few pictures at a time."""
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
        made = await made_when_free(lambda: renderer.make(job, part))
        await asyncio.to_thread(self._store.save, job, made)

    async def _sweep(self) -> None:
        while True:
            try:
                await asyncio.to_thread(self._store.expire)
                await asyncio.to_thread(self._artifacts.sweep)
            except Exception:
                logger.exception("expired jobs and files could not be deleted; trying again")
            await asyncio.sleep(SWEEP_S)


async def _collect(making: dict[asyncio.Task[None], int]) -> None:
    """Wait until one task is done. Raise its exception, if it has one."""
    done, _ = await asyncio.wait(making, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        del making[task]
        task.result()
