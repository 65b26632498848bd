"""The embedded checkpoint, loaded once a session."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tdm_runtime.checkpoint import DEFAULT_CHECKPOINT
from tdm_runtime.loaded_model import LoadedModel, load_model


@pytest.fixture(scope="session")
def checkpoint_folder() -> Path:
    """The checkpoint that the repository ships. Never write there."""
    return DEFAULT_CHECKPOINT


@pytest.fixture(scope="session")
def model(checkpoint_folder: Path) -> LoadedModel:
    """The embedded model on the CPU. Its text encoder is not thread-safe: use it beside no running engine."""
    torch.set_num_threads(1)  # the engine and the decoder run beside each other; two each would fight for two cores
    return load_model(checkpoint_folder, device="cpu")
