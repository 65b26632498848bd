"""What a rendering refuses before it starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from serving.config import ModelSource, ServerConfig
from serving.offline.plan import find_models
from tdm_runtime.errors import CheckpointError
from tests.stock_checkpoints import CASES, save_checkpoint


def test_a_model_of_clips_is_refused_by_name(tmp_path: Path) -> None:
    folder = save_checkpoint(CASES["AnimateDiff-Lightning"], tmp_path / "clips")
    with pytest.raises(CheckpointError, match="is of animatediff, which makes clips; tdm-render makes pictures"):
        find_models(ServerConfig(models=(ModelSource(folder),)))
