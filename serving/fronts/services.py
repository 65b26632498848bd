"""Services that the fronts of one process share."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from serving.arrival import Turnstile
from serving.config import ServerConfig
from serving.fronts.access import Access
from serving.fronts.idempotency import Replays
from serving.images.interface import Images
from serving.jobs.artifacts import ArtifactStore, open_artifacts
from serving.jobs.job_service import JobService
from serving.telemetry.metrics import ServerMetrics
from serving.telemetry.tracing import Tracing


@dataclass
class Services:
    """Services that requests need. HTTP and gRPC use the same object."""

    config: ServerConfig
    metrics: ServerMetrics
    access: Access
    images: Images
    replays: Replays
    artifacts: ArtifactStore
    jobs: JobService
    turnstile: Turnstile = field(default_factory=Turnstile)
    tracing: Tracing | None = None
    """None if tracing is off."""
    num_active: int = 0
    """Number of requests of all fronts that are not yet answered."""
    num_reading: int = 0
    """Number of requests whose given pictures are being read, see `reading_pictures`."""
    is_draining: bool = False

    @classmethod
    def start(cls, config: ServerConfig, metrics: ServerMetrics, images: Images) -> Services:
        """Make the services that requests need beside `images`.

        Raises:
            ValueError, OSError: the key file, the database or the place for files cannot be used.
        """
        access, artifacts = Access(config.api_keys), open_artifacts(config)
        jobs = JobService(config, images, artifacts, metrics)
        services = cls(config, metrics, access, images, Replays(), artifacts, jobs, tracing=Tracing.start(config))
        metrics.watch_requests(lambda: services.num_active, config.max_open_requests)
        metrics.watch_live(lambda: images.num_live, config.engine.max_live * config.max_replicas)
        return services

    @property
    def is_ready(self) -> bool:
        """Whether new requests are accepted."""
        return self.images.is_healthy and not self.is_draining

    async def drain(self) -> None:
        """Refuse new requests with 503. Return when every accepted request is answered."""
        self.is_draining = True
        await self.jobs.stop()
        while self.num_active:
            await asyncio.sleep(0.01)

    def close(self) -> None:
        """Finish accepted pictures, then stop."""
        self.images.close()
        self.jobs.close()
        if self.tracing is not None:
            self.tracing.close()
