"""One tritonserver for all tests, on a tiny checkpoint and on a folder of clips."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tdm_runtime import BackendConfig, LoadedModel, load_model
from tests.model_repository.triton_server import TritonServer, copy_repository, set_parameters
from tests.stock_checkpoints import CASES, save_checkpoint

WORD = "forbidden"


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(CASES["AnimateDiff-Lightning"], tmp_path_factory.mktemp("folders") / "clips")


@pytest.fixture(scope="session")
def triton(
    tiny_checkpoint: Path, clip_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TritonServer]:
    """Server of the tiny checkpoint, and of clips as `clips` and `clips_http`. It must exit with 0 on SIGTERM."""
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
    repository = copy_repository(folder / "models", parameters)
    for name in ("tdm", "tdm_http"):
        shutil.copytree(repository / name, repository / name.replace("tdm", "clips"))
    set_parameters(repository / "clips", {"checkpoint": str(clip_folder)})
    set_parameters(repository / "clips_http", {"model": "clips"})
    server = TritonServer(repository, folder / "log")
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
