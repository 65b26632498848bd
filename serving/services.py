"""What the fronts of one process share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from serving.access import Access, Caller
from serving.answers import ImageAnswer, PartialAnswer
from serving.config import ServerConfig
from serving.idempotency import Replays
from serving.metrics import ServerMetrics
from serving.schema.images import ImageRequest
from serving.schema.models import ModelCard
from serving.tracing import Tracing
from tdm_runtime.recipe import Recipe


class Images(Protocol):
    """What makes pictures: engines here (`ImageService`) or elsewhere (`RemoteImages`)."""

    @property
    def is_healthy(self) -> bool: ...
    @property
    def num_live(self) -> int: ...
    def models(self) -> list[ModelCard]: ...
    def model_card(self, name: str | None) -> ModelCard: ...
    def recipe(self, name: str | None) -> Recipe: ...
    async def generate(self, request: ImageRequest, as_pixels: bool = False) -> ImageAnswer: ...
    async def stream(self, request: ImageRequest) -> AsyncIterator[PartialAnswer | ImageAnswer]: ...
    def close(self) -> None: ...


@dataclass
class Services:
    """What the fronts need, made once and given to HTTP and gRPC alike."""

    config: ServerConfig
    metrics: ServerMetrics
    access: Access
    images: Images
    replays: Replays
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
        services = cls(config, metrics, Access(config.api_keys), images, Replays(), Tracing.start(config))
        metrics.watch_requests(lambda: services.num_active, config.max_open_requests)
        metrics.watch_live(lambda: images.num_live, config.engine.max_live * config.max_replicas)
        return services

    def spend(self, caller: Caller, request: ImageRequest) -> None:
        """Take a request out of its caller's quotas.

        Raises:
            InvalidRequestError, APIError: the request's mistake, or the quota is used up.
        """
        caller.spend(request.cost(self.images.recipe(request.model)))

    @property
    def is_ready(self) -> bool:
        """Whether new requests are taken."""
        return self.images.is_healthy and not self.is_draining

    async def drain(self) -> None:
        """Refuse work with 503 from here on; return when every accepted request is answered."""
        self.is_draining = True
        while self.num_active:
            await asyncio.sleep(0.01)

    def close(self) -> None:
        """Finish what was accepted, then stop."""
        self.images.close()
        if self.tracing is not None:
            self.tracing.close()
