"""Pipeline folders of every family, at minimal size."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.tiny_pipelines import build_pipeline


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Family -> folder of its pipeline, as diffusers saves it. Never write there."""
    root = tmp_path_factory.mktemp("pipelines")

    @cache
    def folder(family: str) -> Path:
        build_pipeline(family).save_pretrained(root / family)
        return root / family

    return folder
