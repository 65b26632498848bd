"""BentoML with adaptive batching: one service makes batches, another in front of it has the HTTP routes."""

# No `from __future__ import annotations`: BentoML reads the annotations of its API methods as they are.

import asyncio
import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import cast

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from benchmarks.peers.command import PeerConfig, parse_arguments
from benchmarks.peers.pipelines import MAX_BATCH_SIZE, Job, OneThread, PeerBackend, load_pipeline
from benchmarks.peers.refusal import exit_without
from benchmarks.peers.wire import ImageRequest, image_answer

# BentoML reads these when it is imported: no usage reports, and a model store apart from the user's own.
os.environ["BENTOML_DO_NOT_TRACK"] = "True"
os.environ.setdefault("BENTOML_HOME", os.path.join(tempfile.gettempdir(), "tdm-peers-bentoml"))

try:
    import bentoml
except ImportError:
    exit_without("bentoml")

BACKEND = "TDM_PEER_BACKEND"
CHECKPOINT = "TDM_PEER_CHECKPOINT"
"""Environment variables for the services: BentoML's own command starts them and passes no arguments."""
MAX_LATENCY_MS = 60_000
"""BentoML's default: it answers 503 if it expects a request to take longer."""
STOP_TIMEOUT_S = "3"

app = FastAPI()


class BatchItem(BaseModel):
    """Request for one picture, passed between the two services."""

    prompt: str
    seed: int
    num_inference_steps: int


@bentoml.service(
    workers=1,
    logging={"access": {"enabled": False}},
    # By default the front closes its connections after 100 requests, and requests still on them fail.
    runner_connection={"max_requests": 2**31, "max_age": 1e9},
)
class Maker:
    """Process of the model. BentoML learns from measured times how long to keep a batch open."""

    def __init__(self) -> None:
        backend, checkpoint = cast(PeerBackend, os.environ[BACKEND]), Path(os.environ[CHECKPOINT])
        self._pipeline = OneThread(partial(load_pipeline, backend, checkpoint, MAX_BATCH_SIZE))

    @bentoml.api(batchable=True, max_batch_size=MAX_BATCH_SIZE, max_latency_ms=MAX_LATENCY_MS)  # type: ignore[untyped-decorator]
    async def make(self, items: list[BatchItem]) -> list[bytes]:
        jobs = [Job(item.prompt, item.seed, item.num_inference_steps) for item in items]
        return await asyncio.wrap_future(self._pipeline.submit(jobs))


@bentoml.service(workers=1, logging={"access": {"enabled": False}})
@bentoml.asgi_app(app, path="/")
class Images:
    """HTTP front. A batchable API takes and returns lists, so BentoML's documentation puts such a service in front."""

    maker = bentoml.depends(Maker)

    @app.get("/health")
    async def health(self) -> JSONResponse:
        is_ready = await self.maker.to_async.is_ready()
        return JSONResponse("ok" if is_ready else "loading", 200 if is_ready else 503)

    @app.post("/v1/images/generations")
    async def generate(self, request: ImageRequest) -> JSONResponse:
        job = request.job()
        (png,) = await self.maker.to_async.make([request.model_dump()])
        return JSONResponse(image_answer(png, job))


def main(config: PeerConfig) -> int:
    """Replace this process with BentoML's command, which serves until SIGINT or SIGTERM."""
    os.environ |= {BACKEND: config.backend, CHECKPOINT: str(config.checkpoint)}
    command = [sys.executable, "-m", "bentoml", "serve", "benchmarks.peers.bentoml_service:Images"]
    command += ["--host", "127.0.0.1", "--port", str(config.port), "--working-dir", os.getcwd()]
    command += ["--timeout-graceful-shutdown", STOP_TIMEOUT_S]
    os.execv(sys.executable, command)


if __name__ == "__main__":
    sys.exit(main(parse_arguments("bentoml_service")))
