"""What the fronts of one replica share."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from serving.access import Access
from serving.artifacts import ArtifactStore, open_artifacts
from serving.config import ServerConfig
from serving.idempotency import Replays
from serving.jobs.service import JobService
from serving.metrics import ServerMetrics
from serving.service import ImageService


@dataclass
class Services:
    """One replica's services, made once and given to HTTP and gRPC alike."""

    config: ServerConfig
    metrics: ServerMetrics
    access: Access
    images: ImageService
    replays: Replays
    artifacts: ArtifactStore
    jobs: JobService
    num_active: int = 0
    """Requests of all fronts that are not yet answered."""
    is_draining: bool = False

    @classmethod
    def start(cls, config: ServerConfig) -> Services:
        """Load the model and whatever else requests need.

        Raises:
            TDMError, ValueError, OSError: something cannot be used; better now than at the first request.
        """
        metrics = ServerMetrics()
        artifacts = open_artifacts(config)
        images = ImageService(config, metrics)
        jobs = JobService(config, images, artifacts, metrics)
        return cls(config, metrics, Access(config.api_keys), images, Replays(), artifacts, jobs)

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
