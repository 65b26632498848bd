"""The server as Ray Serve deployments: engine and fronts in one process, or an ingress before engines anywhere."""

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
    """Ray's own warnings, in its own fields; the server logs its requests itself."""
    return LoggingConfig(log_level="WARNING", enable_access_log=False, encoding=log_format.upper())


HEAD = {"node:__internal_head__": 0.001}
"""What only the head node has: the ingress lives where Ray's own bookkeeping does, and dies with nothing else."""


class Front(Protocol):
    """What listens."""

    @property
    def is_running(self) -> bool: ...
    async def close(self) -> None: ...


async def start_http(config: ServerConfig, services: Services) -> Front:
    """Listen for HTTP."""
    from serving.web.app import build_app

    return await HTTPFront.start(build_app(services), config.host, config.port)


async def start_grpc(config: ServerConfig, services: Services) -> list[Front]:
    """Listen for gRPC, where that is asked for."""
    if config.grpc_port is None:
        return []
    from serving.rpc.grpc_front import GRPCFront

    return [await GRPCFront.start(services, config.host, config.grpc_port)]


OPTIONS: dict[str, Any] = {
    # Admission is the engine's own, so Ray queues nothing.
    "max_ongoing_requests": 4096,
    # What a constructor refuses once it refuses again: a checkpoint does not mend itself.
    "max_constructor_retry_count": 1,
    # A check finds a replica whose process died; no other request finds it, as no other process has its port.
    "health_check_period_s": 2,
}
"""Options of every deployment."""


class Fronts:
    """The process that listens: what Ray and `tdm-serve` ask of it."""

    images: Images
    services: Services
    fronts: list[Front]

    def backend(self) -> str:
        """What runs the default model and, where it was measured, why."""
        return self.images.backend

    async def drain(self) -> None:
        """Answer what was accepted, and stop listening. Called by `tdm-serve` before it stops."""
        await self.services.drain()
        for front in self.fronts:
            await front.close()

    async def __del__(self) -> None:
        """Called by Ray when it stops a replica. Ray does not know the requests of the replica's own fronts."""
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
        # Last: who can connect is served.
        self.services.jobs.start()
        self.fronts = [*await start_grpc(config, self.services), await start_http(config, self.services)]

    def check_health(self) -> None:
        """Asked by Ray; a replica whose engine died, or that nobody can reach, is replaced."""
        if not self.images.is_healthy:
            raise RuntimeError("the engine's thread is not running")
        if self.services.is_ready and not all(front.is_running for front in self.fronts):
            raise RuntimeError("a front is not running")


@serve.deployment(name="engines", ray_actor_options={"num_cpus": 1}, **OPTIONS)
class EngineDeployment:
    """One engine behind an ingress. What it refuses it returns: Ray would wrap what is raised."""

    def __init__(self, config: ServerConfig) -> None:
        from serving.images.local import ImageService

        set_up_logging(config)
        self.images = ImageService(config, ServerMetrics())

    async def generate(self, order: ImageOrder, elapsed_s: float) -> ImageAnswer | APIError:
        """As `ImageService.generate`, of a request that arrived so long ago."""
        arrive(elapsed_s)
        try:
            return await self.images.generate(order)
        except Exception as error:
            return refusal(error)

    async def stream(
        self, order: ImageOrder, elapsed_s: float
    ) -> AsyncIterator[PartialAnswer | ImageAnswer | APIError]:
        """As `ImageService.stream`, of a request that arrived so long ago."""
        arrive(elapsed_s)
        try:
            async for part in await self.images.stream(order):
                yield part
        except Exception as error:
            yield refusal(error)

    async def listing(self) -> Listing:
        """What is served."""
        cards = self.images.models()
        return Listing(cards, {card.id: self.images.recipe(card.id) for card in cards}, self.images.backend)

    def check_health(self) -> None:
        """Asked by Ray; a replica whose engine died is replaced."""
        if not self.images.is_healthy:
            raise RuntimeError("the engine's thread is not running")

    async def __del__(self) -> None:
        """Called by Ray when it stops a replica, after its last request."""
        if hasattr(self, "images"):
            await asyncio.to_thread(self.images.close)


@serve.deployment(
    name="images", max_queued_requests=-1, ray_actor_options={"num_cpus": 0, "resources": HEAD}, **OPTIONS
)
@serve.ingress()
class IngressDeployment(Fronts):
    """HTTP behind Ray's proxy, before engines on any machine."""

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
    """What `serve run serving.deployment:app` and KubeRay's RayService build (deploy/rayservice.yaml).

    Args:
        arguments: `command`: the arguments of `tdm-serve`; what belongs to one machine, as its port, is Ray's there.
    """
    from serving.command.arguments import parse_arguments

    return build_application(parse_arguments(["--front", "ray", *shlex.split(arguments.get("command", ""))]))
