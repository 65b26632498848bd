"""Pipeline folders of every family, at minimal size."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.tiny_pipelines import build_pipeline


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Family -> folder of its pipeline, as diffusers saves it, with a schedule for all sizes. Never write there."""
    root = tmp_path_factory.mktemp("pipelines")

    @cache
    def folder(family: str) -> Path:
        pipeline = build_pipeline(family)
        if pipeline.scheduler.config.get("use_dynamic_shifting"):  # training refuses it
            static = type(pipeline.scheduler).from_config(pipeline.scheduler.config, use_dynamic_shifting=False)
            pipeline.register_modules(scheduler=static)
        pipeline.save_pretrained(root / family)
        return root / family

    return folder
