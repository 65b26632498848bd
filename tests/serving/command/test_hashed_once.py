"""A start hashes each file of a checkpoint once, however many replicas it has."""

from __future__ import annotations

import pickle
import shutil
from collections import Counter
from pathlib import Path

import pytest

from serving.command.checks import check
from serving.config import ModelSource, ServerConfig
from serving.images.local import ImageService
from serving.telemetry.metrics import ServerMetrics
from tdm_runtime.errors import CheckpointError
from tdm_runtime.model.artifacts import BackendConfig
from tests.ports import free_port

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def config_of(folder: Path, state: Path) -> ServerConfig:
    return ServerConfig(
        models=(ModelSource(folder),),
        port=free_port(),
        state_folder=state,
        backend=BackendConfig("torch", threads=1, device="cpu"),
    )


def start_replica(config: ServerConfig) -> None:
    """Load and warm up all models as a replica does, from the configuration as Ray hands it over."""
    ImageService(pickle.loads(pickle.dumps(config)), ServerMetrics()).close()


def test_a_start_of_two_replicas_hashes_each_file_once(
    tiny_checkpoint: Path, tmp_path: Path, hashed: Counter[Path]
) -> None:
    config = config_of(tiny_checkpoint, tmp_path)
    with check(config):
        start_replica(config)
        start_replica(config)
    assert hashed[tiny_checkpoint / WEIGHTS] == 1
    assert set(hashed.values()) == {1}
    assert set(tiny_checkpoint.rglob("*.safetensors")) <= hashed.keys()


def test_a_file_that_is_damaged_before_a_replica_starts_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    config = config_of(folder, tmp_path)
    with check(config), (folder / WEIGHTS).open("r+b") as stream:
        stream.seek(-1, 2)
        (last,) = stream.read(1)
        stream.seek(-1, 2)
        stream.write(bytes([last ^ 1]))
        stream.flush()
        with pytest.raises(CheckpointError, match=f"{WEIGHTS} is damaged"):
            start_replica(config)
