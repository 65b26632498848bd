"""LitServe with its own batching: one process for HTTP and one for the model."""

# No `from __future__ import annotations`: LitServe reads the annotations of its hooks as they are.

import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.command import PeerConfig, parse_arguments
from benchmarks.peers.pipelines import MAX_BATCH_SIZE, Job, PeerBackend, Pipeline, load_pipeline, make_grouped
from benchmarks.peers.refusal import exit_without
from benchmarks.peers.wire import ImageRequest, image_answer

try:
    import litserve
except ImportError:
    exit_without("litserve")

BATCH_TIMEOUT_S = 0.005
"""How long a batch stays open. With 16 clients, batches are full at 2, 5 and 20 ms, because requests wait while the
previous batch runs. With 8 clients they hold 3.9, 4.3 and 6.7 pictures, but a single client waits longer."""


class ImageAPI(litserve.LitAPI):  # type: ignore[misc]
    """Process of the model. Its main thread loads and runs everything, so there is one OpenMP team."""

    def __init__(self, backend: PeerBackend, checkpoint: Path) -> None:
        super().__init__(
            max_batch_size=MAX_BATCH_SIZE, batch_timeout=BATCH_TIMEOUT_S, api_path="/v1/images/generations"
        )
        self._backend = backend
        self._checkpoint = checkpoint
        self._pipeline: Pipeline | None = None

    def setup(self, device: str) -> None:
        """Load the model. `/health` answers 200 afterwards."""
        self._pipeline = load_pipeline(self._backend, self._checkpoint, MAX_BATCH_SIZE)

    def decode_request(self, request: ImageRequest) -> Job:
        return request.job()

    def batch(self, inputs: Sequence[Job]) -> Sequence[Job]:
        return inputs

    def predict(self, x: Sequence[Job]) -> list[tuple[bytes, Job]]:
        assert self._pipeline is not None
        return list(zip(make_grouped(self._pipeline, x), x, strict=True))

    def unbatch(self, output: list[tuple[bytes, Job]]) -> list[tuple[bytes, Job]]:
        return output

    def encode_response(self, output: tuple[bytes, Job]) -> dict[str, Any]:
        return image_answer(*output)


def main(config: PeerConfig) -> int:
    """Serve until SIGINT or SIGTERM. Returns the exit status."""
    server_pid = os.getpid()

    def interrupt(*_: object) -> None:
        if os.getpid() != server_pid:  # LitServe forks the HTTP process, which inherits this handler
            os._exit(0)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)  # LitServe ends its processes on SIGINT only
    # LitServe's default timeout stays: it answers 504 after 30 s.
    api = ImageAPI(config.backend, config.checkpoint)
    server = litserve.LitServer(api, accelerator="cpu", devices=1, workers_per_device=1)
    try:
        server.run(host="127.0.0.1", port=config.port, log_level="warning", generate_client_file=False)
    except KeyboardInterrupt:  # interrupted before it was ready
        pass
    finally:
        for child in multiprocessing.active_children():
            child.kill()
    return 0


if __name__ == "__main__":
    sys.exit(main(parse_arguments("litserve_batch")))
