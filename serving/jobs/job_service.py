"""Jobs for the fronts: create, look up, list, cancel, delete. Calls that block run outside the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from serving.config import ServerConfig
from serving.images.interface import Images
from serving.jobs.artifacts import ArtifactStore
from serving.jobs.batch_job import BatchRenderer
from serving.jobs.job import Job, JobKind, JobLimits, JobRequest
from serving.jobs.store import JobStore
from serving.jobs.video_job import VideoRenderer
from serving.jobs.worker import JobWorker, Renderer
from serving.telemetry.metrics import ServerMetrics
from tdm_runtime.media.provenance import Provenance

LEASE_S = 10.0
"""Time after which a server loses a job whose lease it has not renewed, in seconds."""


class JobService:
    """One replica's view of the queue, and its worker."""

    def __init__(self, config: ServerConfig, images: Images, artifacts: ArtifactStore, metrics: ServerMetrics) -> None:
        """
        Raises:
            ValueError, OSError: the database cannot be used.
        """
        keep_s, provenance = config.artifact_ttl_s, Provenance(config.provenance)
        self._store = open_store(config)
        self._limits = JobLimits()
        self._renderers: dict[JobKind, Renderer] = {
            "video": VideoRenderer(images, artifacts, keep_s, self._store.report, provenance),
            "batch": BatchRenderer(images, artifacts, keep_s),
        }
        self._worker = JobWorker(
            self._store, artifacts, self._renderers, lambda: [card.id for card in images.models()], metrics
        )

    def start(self) -> None:
        """Begin to work on jobs, in the running event loop."""
        self._worker.start()

    async def stop(self) -> None:
        """Stop working on jobs. Another server can continue the unfinished ones."""
        await self._worker.stop()

    def close(self) -> None:
        self._store.close()

    async def create(self, wanted: JobRequest, approve: Callable[[], None]) -> Job:
        """Accept a job. When this returns, the job is on the disk.

        Raises:
            APIError: see `JobStore.create`.
        """
        job = await asyncio.to_thread(self._store.create, wanted, self._limits, approve)
        self._worker.wake()
        return job

    async def get(self, kind: JobKind, owner: str, job_id: str) -> Job:
        """Return a caller's job.

        Raises:
            APIError: 404, the caller has no such job.
        """
        return await asyncio.to_thread(self._store.get, kind, owner, job_id)

    async def page(self, kind: JobKind, owner: str, after: str | None, limit: int, newest_first: bool) -> list[Job]:
        """Return a caller's jobs in the order of their creation.

        Raises:
            APIError: 404, `after` is not one of them.
        """
        return await asyncio.to_thread(self._store.page, kind, owner, after, limit, newest_first)

    async def cancel(self, kind: JobKind, owner: str, job_id: str) -> Job:
        """Cancel a job. A job that has ended stays as it is.

        Raises:
            APIError: 404, the caller has no such job.
        """
        job = await asyncio.to_thread(self._store.cancel, kind, owner, job_id)
        self._worker.drop(job.id)
        return job

    async def delete(self, kind: JobKind, owner: str, job_id: str) -> None:
        """Delete a job and its result, in any state.

        Raises:
            APIError: 404, the caller has no such job.
        """
        job = await asyncio.to_thread(self._store.delete, kind, owner, job_id)
        self._worker.drop(job.id)
        if job.status == "completed":
            await asyncio.to_thread(self._renderers[kind].discard, job.result)


def open_store(config: ServerConfig) -> JobStore:
    """Return the queue of a configuration. Makes the state folder if the queue is there.

    Raises:
        ValueError, OSError: the queue cannot be used.
    """
    url = config.database_url
    if url is None:
        config.state_folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        url = f"sqlite:///{config.state_folder / 'jobs.db'}"
    return JobStore(url, LEASE_S, config.artifact_ttl_s)
