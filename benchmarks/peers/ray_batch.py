"""Ray Serve with `@serve.batch`, behind a FastAPI ingress as Ray's documentation shows it.

HTTP listens on 127.0.0.1. Ray's own ports listen on every address, so they need a token.
"""

# No `from __future__ import annotations`: FastAPI cannot resolve them in a class that Ray has rebuilt.

import logging
import os
import secrets
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import JSONResponse

from benchmarks.peers.command import PeerConfig, parse_arguments
from benchmarks.peers.pipelines import MAX_BATCH_SIZE, Job, PeerBackend, load_pipeline, make_grouped
from benchmarks.peers.refusal import exit_without
from benchmarks.peers.wire import ImageRequest, image_answer

# Ray reads these when it is imported, here and in its processes: no usage reports, and a token for its own ports.
os.environ |= {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": os.environ.get("RAY_AUTH_TOKEN", secrets.token_hex(32)),
}

try:
    import ray
    from ray import serve
    from ray.serve.schema import LoggingConfig
except ImportError:
    exit_without("ray[serve]")

BATCH_WAIT_TIMEOUT_S = 0.005
"""How long a batch stays open after its first request; even a lone request waits that long. With 8 clients batches
hold 4.1 pictures, and no more at Ray's default of 10 ms."""
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

app = FastAPI()


@serve.deployment(
    # Ray's default of 5 would never fill a batch: the next requests must gather while one batch runs.
    max_ongoing_requests=4 * MAX_BATCH_SIZE,
    # Ray gives torch one thread per requested core, and a replica requests one core by default.
    ray_actor_options={"num_cpus": CORES},
)
@serve.ingress(app)
class Images:
    """The single replica."""

    def __init__(self, backend: PeerBackend, checkpoint: Path) -> None:
        self._pipeline = load_pipeline(backend, checkpoint, MAX_BATCH_SIZE)

    @app.get("/health")
    async def health(self) -> str:
        return "ok"

    @app.post("/v1/images/generations")
    async def generate(self, request: ImageRequest) -> JSONResponse:
        job = request.job()
        return JSONResponse(image_answer(await self._make(job), job))

    @serve.batch(max_batch_size=MAX_BATCH_SIZE, batch_wait_timeout_s=BATCH_WAIT_TIMEOUT_S)  # type: ignore[untyped-decorator]
    async def _make(self, jobs: list[Job]) -> Sequence[bytes]:
        """Make a batch on the event loop and block it, as in Ray's examples.

        Batches would be smaller in a separate thread: Ray closes a batch after its wait even if the model is
        busy. On the loop, requests that arrive meanwhile form one batch. Ray checks the replica's health on
        another loop.
        """
        return make_grouped(self._pipeline, jobs)


def main(config: PeerConfig) -> int:
    """Serve until SIGINT or SIGTERM. Returns the exit status."""
    ray.init(
        address="local",
        num_cpus=CORES + 1,  # one more for the accounting of Ray's own actors; the real cores are shared anyway
        include_dashboard=False,
        logging_level=logging.WARNING,
        _node_ip_address="127.0.0.1",
    )
    # Set after Ray starts, because Ray installs its own handlers.
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": config.port}, logging_config=quiet)
        images: serve.Deployment = Images
        deployment = images.options(graceful_shutdown_timeout_s=2, logging_config=quiet)
        serve.run(deployment.bind(config.backend, config.checkpoint), name="images", route_prefix="/")
        stop.wait()
    finally:
        ray.shutdown()  # ends every process that `init` started; a `serve.shutdown` first would take seconds longer
    return 0


if __name__ == "__main__":
    # Import by name: Ray would pickle classes of `__main__` by value.
    from benchmarks.peers import ray_batch

    sys.exit(ray_batch.main(parse_arguments("ray_batch")))
