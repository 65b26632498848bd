"""Fixtures: an engine with the tiny checkpoint, and an HTTP server in front of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tdm_runtime.engine.engine import DiffusionEngine, EngineConfig
from tdm_runtime.model.artifacts import BackendConfig
from tdm_runtime.model.choice import load_model
from tdm_runtime.model.loaded_model import LoadedModel
from tests.benchmarks.small_server import SmallServer, serving


@pytest.fixture(scope="session")
def tiny_model(tiny_checkpoint: Path) -> LoadedModel:
    """Model of the tiny checkpoint on the CPU. Its text encoder is not thread-safe: use one engine at a time."""
    return load_model(tiny_checkpoint, BackendConfig(threads=1), device="cpu")


@pytest.fixture
def engine(tiny_model: LoadedModel) -> Iterator[DiffusionEngine]:
    with DiffusionEngine(tiny_model, EngineConfig(max_live=8)) as running:
        yield running


@pytest.fixture
def server(engine: DiffusionEngine) -> Iterator[SmallServer]:
    with serving(engine) as running:
        yield running
