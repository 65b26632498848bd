"""Fixtures of all tests: the embedded checkpoint and a tiny one, each loaded and exported once per session."""

from __future__ import annotations

import fcntl
import importlib.util
import logging
import os
import shutil
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

from export.cli import main as tdm_export
from serving.telemetry.logs import OURS, THEIRS, start_logger
from tdm_runtime.backends.openvino import has_bf16
from tdm_runtime.checkpoint import file_hashes
from tdm_runtime.checkpoint.folder import DEFAULT_CHECKPOINT, open_checkpoint
from tdm_runtime.checkpoint.manifest import default_artifacts
from tdm_runtime.model.choice import load_model
from tdm_runtime.model.loaded_model import LoadedModel
from tdm_runtime.model.parity import PROMPTS
from tests.serving.conftest import RunningServer, start_server
from tests.tiny_checkpoint import write_tiny_checkpoint

TINY_PROMPTS = PROMPTS[:2]
"""Prompts that the artifacts of the tiny checkpoint are verified with."""
ONE_AT_A_TIME = (
    "deploy",
    "gpu",
    "serving",
    *(f"benchmarks/test_{name}" for name in ("live", "soak", "start", "turns")),
)
"""Beginnings of the paths, below `tests`, of the tests that start servers or need the GPU."""
BESIDE = ("serving/offline", "serving/schema")
"""Of these paths, those whose tests need neither."""


class Groups(LoadFileScheduling):
    """Groups of tests for pytest-xdist, which runs each group in one process. Every file is one.

    The paths of `ONE_AT_A_TIME` are one group together: their tests share one server and never run beside each other.
    """

    def _split_scope(self, nodeid: str) -> str:
        file: str = super()._split_scope(nodeid)
        path = file.removeprefix("tests/")
        return "one at a time" if path.startswith(ONE_AT_A_TIME) and not path.startswith(BESIDE) else file


def pytest_configure() -> None:
    """Give PyTorch one thread in the processes that tests start; servers set their own number.

    The models are tiny. With two threads each operation waits for both, which takes several times the processor time
    and, if other processes use the cores, 30 times as long.
    """
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Groups | None:
    """Use our groups for `--dist loadfile`. pytest-xdist 3.8 ignores the marks of `--dist loadgroup` on pytest 9.2."""
    return Groups(config, log) if config.getoption("dist") == "loadfile" else None


collect_ignore = [] if importlib.util.find_spec("tritonclient") else ["model_repository"]
"""Triton's tests need its environment: `build/triton/bin/python -m pytest tests/model_repository`."""


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Give PyTorch one thread in this process, before each test. A command in an earlier test may have set more."""
    torch.set_num_threads(1)


LOGGERS = [logging.getLogger(name) for name in (*OURS, *THEIRS, start_logger.name)]
LOGGING = [(logger.handlers, logger.level, logger.propagate) for logger in LOGGERS]
THREAD_HOOK = threading.excepthook


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    """Give the loggers back the settings of the start: commands that run in this process set them for a server."""
    yield
    threading.excepthook = THREAD_HOOK
    for logger, (handlers, level, propagate) in zip(LOGGERS, LOGGING, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Cache folder of the session. Tests and their servers use it instead of the user's."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def checkpoint_folder() -> Path:
    """Checkpoint of the repository. Never write there."""
    return DEFAULT_CHECKPOINT


@pytest.fixture(scope="session")
def model(checkpoint_folder: Path) -> LoadedModel:
    """Embedded model on the CPU. Its text encoder is not thread-safe, so do not use it while an engine runs."""
    return load_model(checkpoint_folder, device="cpu")


@pytest.fixture(scope="session")
def artifacts(checkpoint_folder: Path, cache_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Artifacts of the embedded checkpoint, in the folder where servers find them. Never write there."""
    built = export_once(checkpoint_folder, "embedded-artifacts", PROMPTS[:4], tmp_path_factory)
    return Path(shutil.copytree(built, default_artifacts(open_checkpoint(checkpoint_folder))))


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint of minimal size, with a tiny autoencoder. Never write there."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="session")
def tiny_artifacts(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Artifacts of the tiny checkpoint, in a folder of their own. Never write there."""
    built = export_once(tiny_checkpoint, "tiny-artifacts", TINY_PROMPTS, tmp_path_factory)
    return Path(shutil.copytree(built, tmp_path_factory.mktemp("tiny") / "artifacts"))


@pytest.fixture(scope="session")
def tdm_server(artifacts: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Server of the embedded checkpoint for all tests. At the end it must exit with 0 on SIGTERM."""
    assert artifacts.is_dir()
    running = start_server(
        tmp_path_factory.mktemp("server") / "log",
        *("--checkpoint", str(DEFAULT_CHECKPOINT), "--max-live", "32", "--trusted-proxies", "127.0.0.1"),
    )
    yield running
    assert running.stop() == 0, running.log.read_text()[-2000:]


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> Counter[Path]:
    """Number of times that each file's content was hashed."""
    counts, file_sha256 = Counter[Path](), file_hashes.file_sha256

    def counting(file: Path) -> str:
        counts[file] += 1
        return file_sha256(file)

    monkeypatch.setattr(file_hashes, "file_sha256", counting)
    return counts


def export_once(checkpoint: Path, name: str, prompts: Sequence[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build and verify all artifacts that run on this CPU, once for all processes of a run. Returns their folder."""
    precisions = "bf16,fp32,int8" if has_bf16() else "fp32,int8"
    command = [str(checkpoint), "--backend", "openvino,onnxruntime", "--precision", precisions]
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # the folder of the run; each process has one below it
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / f"{name}.txt").write_text("\n".join(prompts))
        command += ["--prompts", str(folder / f"{name}.txt")]
        assert tdm_export([*command, "--output", str(folder / name)]) == 0  # builds nothing the second time
    return folder / name
