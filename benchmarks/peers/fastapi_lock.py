"""FastAPI and uvicorn, one picture at a time.

Such servers usually put a lock around the pipeline. Here a single thread takes the place of the lock; `OneThread`
says why.
"""

from __future__ import annotations

import asyncio
import sys
from functools import partial

from fastapi import FastAPI
from fastapi.responses import JSONResponse

from benchmarks.peers.command import PeerConfig, parse_arguments
from benchmarks.peers.pipelines import OneThread, load_pipeline
from benchmarks.peers.refusal import exit_without
from benchmarks.peers.wire import ImageRequest, image_answer

try:
    import uvicorn
except ImportError:
    exit_without("uvicorn")

STOP_TIMEOUT_S = 5


def build_app(pipeline: OneThread) -> FastAPI:
    """Return the application."""
    app = FastAPI()

    @app.get("/health")
    async def health() -> str:
        return "ok"

    @app.post("/v1/images/generations")
    async def generate(request: ImageRequest) -> JSONResponse:
        job = request.job()
        (png,) = await asyncio.wrap_future(pipeline.submit([job]))
        return JSONResponse(image_answer(png, job))

    return app


def main(config: PeerConfig) -> int:
    """Serve until SIGINT or SIGTERM. Returns the exit status."""
    pipeline = OneThread(partial(load_pipeline, config.backend, config.checkpoint, 1))
    try:
        uvicorn.run(
            build_app(pipeline),
            host="127.0.0.1",
            port=config.port,
            log_level="warning",
            timeout_graceful_shutdown=STOP_TIMEOUT_S,
        )
    finally:
        pipeline.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(parse_arguments("fastapi_lock")))
