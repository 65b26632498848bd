"""What the fronts of one process share."""

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
    """What the fronts need, made once and given to HTTP and gRPC alike."""

    config: ServerConfig
    metrics: ServerMetrics
    access: Access
    images: Images
    replays: Replays
    artifacts: ArtifactStore
    jobs: JobService
    turnstile: Turnstile = field(default_factory=Turnstile)
    tracing: Tracing | None = None
    """None where it is off."""
    num_active: int = 0
    """Requests of all fronts that are not yet answered."""
    is_draining: bool = False

    @classmethod
    def start(cls, config: ServerConfig, metrics: ServerMetrics, images: Images) -> Services:
        """Make what requests need besides pictures.

        Raises:
            ValueError, OSError: something cannot be used; better now than at the first request.
        """
        access, artifacts = Access(config.api_keys), open_artifacts(config)
        jobs = JobService(config, images, artifacts, metrics)
        services = cls(config, metrics, access, images, Replays(), artifacts, jobs, tracing=Tracing.start(config))
        metrics.watch_requests(lambda: services.num_active, config.max_open_requests)
        metrics.watch_live(lambda: images.num_live, config.engine.max_live * config.max_replicas)
        return services

    @property
    def is_ready(self) -> bool:
        """Whether new requests are taken."""
        return self.images.is_healthy and not self.is_draining

    async def drain(self) -> None:
        """Refuse work with 503 from here on; return when every accepted request is answered."""
        self.is_draining = True
        await self.jobs.stop()
        while self.num_active:
            await asyncio.sleep(0.01)

    def close(self) -> None:
        """Finish what was accepted, then stop."""
        self.images.close()
        self.jobs.close()
        if self.tracing is not None:
            self.tracing.close()
