"""The service as a Ray Serve deployment."""

from __future__ import annotations

import asyncio
import logging

from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.schema import LoggingConfig

from serving.config import ServerConfig
from serving.web.front import HTTPFront

QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)
"""Ray's own messages; the server logs its requests itself."""


@serve.deployment(
    name="images",
    max_ongoing_requests=4096,
    max_queued_requests=-1,
    # What a constructor refuses once it refuses again: a checkpoint does not mend itself.
    max_constructor_retry_count=1,
    # That a replica's process died is noticed at a check; nobody else has its port.
    health_check_period_s=2,
    ray_actor_options={"num_cpus": 1},
    logging_config=QUIET,
)
@serve.ingress()
class ImageDeployment:
    """One replica: one service, one engine thread. Admission is the engine's own, so Ray queues nothing."""

    async def __init__(self, config: ServerConfig) -> None:  # type: ignore[misc]  # Ray awaits it
        from serving.services import Services

        set_up_logging(config.log_level)
        self.services = Services.start(config)
        self.services.jobs.start()
        self.front: HTTPFront | None = None
        if config.front == "direct":  # last: who can connect is served
            self.front = await HTTPFront.start(self.__serve_build_asgi_app__(), config.host, config.port)

    def __serve_build_asgi_app__(self) -> FastAPI:
        from serving.web.app import build_app

        return build_app(self.services)

    def check_health(self) -> None:
        """Asked by Ray; a replica whose engine died, or that nobody can reach, is replaced."""
        if not self.services.images.is_healthy:
            raise RuntimeError("the engine's thread is not running")
        if self.front is not None and self.services.is_ready and not self.front.is_running:
            raise RuntimeError("the HTTP front is not running")

    def backend(self) -> str:
        """What runs the model and, where it was measured, why."""
        model = self.services.images.model
        return model.choice or model.backend

    async def drain(self) -> None:
        """Answer what was accepted, and stop listening. Called by `tdm-serve` before it stops."""
        await self.services.drain()
        if self.front is not None:
            await self.front.close()

    async def __del__(self) -> None:
        """Called by Ray when it stops a replica; of requests to its own front Ray knows nothing."""
        if hasattr(self, "services"):
            if self.services.is_ready:
                await self.drain()
            await asyncio.to_thread(self.services.close)


def set_up_logging(level: str) -> None:
    """Our loggers to stderr, which Ray shows in the server's terminal."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    for name in ("serving", "tdm_runtime"):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(level.upper())
        logger.propagate = False


def build_application(config: ServerConfig) -> Application:
    """Return the Serve application."""
    deployment: serve.Deployment = ImageDeployment
    return deployment.options(graceful_shutdown_timeout_s=config.drain_timeout_s).bind(config)
