"""Ray Serve deployments of the server: engine and fronts in one process, or an ingress and engines on any machine."""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import AsyncIterator
from typing import Any, Protocol

from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from serving.arrival import arrive
from serving.config import LogFormat, ServerConfig
from serving.errors import APIError
from serving.fronts.services import Services
from serving.images.interface import Images
from serving.images.remote import Listing, RemoteImages, refusal
from serving.schema.answers import ImageAnswer, PartialAnswer
from serving.schema.order import ImageOrder
from serving.telemetry.logs import set_up_logging
from serving.telemetry.metrics import ServerMetrics
from serving.web.http_front import HTTPFront


def ray_logging(log_format: LogFormat) -> LoggingConfig:
    """Return Ray's logging settings: only warnings, with Ray's own fields. The server logs its requests itself."""
    return LoggingConfig(log_level="WARNING", enable_access_log=False, encoding=log_format.upper())


HEAD = {"node:__internal_head__": 0.001}
"""Resource that only the head node has. It keeps the ingress there: losing another node does not end it."""


class Front(Protocol):
    """A server that listens on an address."""

    @property
    def is_running(self) -> bool: ...
    async def close(self) -> None: ...


async def start_http(config: ServerConfig, services: Services) -> Front:
    """Listen for HTTP."""
    from serving.web.app import build_app

    return await HTTPFront.start(build_app(services), config.host, config.port, config.max_picture_body_bytes)


async def start_grpc(config: ServerConfig, services: Services) -> list[Front]:
    """Listen for gRPC if the configuration has a port for it."""
    if config.grpc_port is None:
        return []
    from serving.rpc.grpc_front import GRPCFront

    return [await GRPCFront.start(services, config.host, config.grpc_port)]


OPTIONS: dict[str, Any] = {
    # The engine does admission itself, so Ray queues nothing.
    "max_ongoing_requests": 4096,
    # A second try would fail too, for example on a damaged checkpoint.
    "max_constructor_retry_count": 1,
    # Only this check finds a replica whose process died: requests reach it on its own port and not through Ray.
    "health_check_period_s": 2,
}
"""Options of every deployment."""


class Fronts:
    """A process with fronts. Ray and `tdm-serve` call its methods."""

    images: Images
    services: Services
    fronts: list[Front]

    def backend(self) -> str:
        """Return the backend of the default model and, where backends were measured, why it was chosen."""
        return self.images.backend

    async def drain(self) -> None:
        """Answer accepted requests, then stop listening. `tdm-serve` calls it before it stops."""
        await self.services.drain()
        for front in self.fronts:
            await front.close()

    async def __del__(self) -> None:
        """Drain and close. Ray calls it when it stops a replica and does not know the requests of its fronts."""
        if hasattr(self, "fronts"):
            if self.services.is_ready:
                await self.drain()
            await asyncio.to_thread(self.services.close)


@serve.deployment(name="images", max_queued_requests=-1, ray_actor_options={"num_cpus": 1}, **OPTIONS)
class DirectDeployment(Fronts):
    """One replica: engine and fronts in one process."""

    async def __init__(self, config: ServerConfig) -> None:  # type: ignore[misc]  # Ray awaits it
        from serving.images.local import ImageService

        set_up_logging(config)
        metrics = ServerMetrics()
        self.images = ImageService(config, metrics)
        self.services = Services.start(config, metrics, self.images)
        self.services.jobs.start()
        # Fronts start last, so that every client that connects gets an answer.
        self.fronts = [*await start_grpc(config, self.services), await start_http(config, self.services)]

    def check_health(self) -> None:
        """Raise if the engine or a front does not run. Ray then replaces the replica."""
        if not self.images.is_healthy:
            raise RuntimeError("the engine's thread is not running")
        if self.services.is_ready and not all(front.is_running for front in self.fronts):
            raise RuntimeError("a front is not running")


@serve.deployment(name="engines", ray_actor_options={"num_cpus": 1}, **OPTIONS)
class EngineDeployment:
    """One engine behind an ingress. It returns errors, because Ray would wrap raised ones."""

    def __init__(self, config: ServerConfig) -> None:
        from serving.images.local import ImageService

        set_up_logging(config)
        self.images = ImageService(config, ServerMetrics())

    async def generate(self, order: ImageOrder, elapsed_s: float) -> ImageAnswer | APIError:
        """Make the pictures of a request that arrived `elapsed_s` seconds ago, see `ImageService.generate`."""
        arrive(elapsed_s)
        try:
            return await self.images.generate(order)
        except Exception as error:
            return refusal(error)

    async def stream(
        self, order: ImageOrder, elapsed_s: float
    ) -> AsyncIterator[PartialAnswer | ImageAnswer | APIError]:
        """Stream the picture of a request that arrived `elapsed_s` seconds ago, see `ImageService.stream`."""
        arrive(elapsed_s)
        try:
            async for part in await self.images.stream(order):
                yield part
        except Exception as error:
            yield refusal(error)

    async def listing(self) -> Listing:
        """Return the served models, their recipes and the backend."""
        cards = self.images.models()
        return Listing(cards, {card.id: self.images.recipe(card.id) for card in cards}, self.images.backend)

    def check_health(self) -> None:
        """Raise if the engine does not run. Ray then replaces the replica."""
        if not self.images.is_healthy:
            raise RuntimeError("the engine's thread is not running")

    async def __del__(self) -> None:
        """Close the engine. Ray calls it when it stops a replica, after its last request."""
        if hasattr(self, "images"):
            await asyncio.to_thread(self.images.close)


@serve.deployment(
    name="images", max_queued_requests=-1, ray_actor_options={"num_cpus": 0, "resources": HEAD}, **OPTIONS
)
@serve.ingress()
class IngressDeployment(Fronts):
    """The process between the clients and engines on any machine: HTTP through Ray's proxy, gRPC on its own port."""

    async def __init__(self, config: ServerConfig, engines: DeploymentHandle[Any]) -> None:  # type: ignore[misc]
        set_up_logging(config)
        metrics = ServerMetrics()
        self.images = await RemoteImages.connect(engines, metrics)
        self.services = Services.start(config, metrics, self.images)
        self.services.jobs.start()
        self.fronts = await start_grpc(config, self.services)

    def __serve_build_asgi_app__(self) -> FastAPI:
        from serving.web.app import build_app

        return build_app(self.services)


def build_application(config: ServerConfig) -> Application:
    """Return the Serve application."""
    options: dict[str, Any] = {
        "graceful_shutdown_timeout_s": config.drain_timeout_s,
        "logging_config": ray_logging(config.log_format),
    }
    if config.front == "direct":
        direct: serve.Deployment = DirectDeployment
        return direct.options(num_replicas=config.min_replicas, **options).bind(config)
    scaling: dict[str, Any] = {"num_replicas": config.min_replicas}
    if config.max_replicas > config.min_replicas:
        scaling = {
            "autoscaling_config": {
                "min_replicas": config.min_replicas,
                "max_replicas": config.max_replicas,
                "target_ongoing_requests": config.engine.max_batch_size,
            }
        }
    engines: serve.Deployment = EngineDeployment
    ingress: serve.Deployment = IngressDeployment
    return ingress.options(**options).bind(config, engines.options(**scaling, **options).bind(config))


def app(arguments: dict[str, str]) -> Application:
    """Return the application for `serve run serving.deployment:app` and KubeRay's RayService (deploy/rayservice.yaml).

    Args:
        arguments: `command` holds the arguments of `tdm-serve`. Ray sets what belongs to a machine, such as the port.
    """
    from serving.command.arguments import parse_arguments

    return build_application(parse_arguments(["--front", "ray", *shlex.split(arguments.get("command", ""))]))
