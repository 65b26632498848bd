"""One tritonserver for all tests, on a tiny checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tdm_runtime import BackendConfig, LoadedModel, load_model
from tests.model_repository.triton_server import TritonServer, copy_repository

WORD = "forbidden"


@pytest.fixture(scope="session")
def triton(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """Server of the tiny checkpoint. At the end it must exit with 0 on SIGTERM."""
    folder = tmp_path_factory.mktemp("triton")
    (folder / "words").write_text(f"{WORD}\n")
    parameters = {
        "checkpoint": str(tiny_checkpoint),
        "backend": "torch",
        "precision": "fp32",
        "threads": "1",
        "max_live": "64",
        "blocked_words": str(folder / "words"),
    }
    server = TritonServer(copy_repository(folder / "models", parameters), folder / "log")
    try:
        server.wait_until_ready()
        yield server
    finally:
        status = server.stop()
    assert status == 0, server.log.read_text(errors="replace")[-2000:]


@pytest.fixture(scope="session")
def reference(tiny_checkpoint: Path) -> LoadedModel:
    """The server's model in this process."""
    return load_model(tiny_checkpoint, BackendConfig("torch", "fp32", threads=1), "cpu")
