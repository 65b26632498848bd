"""What the command checks before it starts a server."""

from __future__ import annotations

from pathlib import Path

import pytest

from serving.command.checks import check_models
from serving.config import ModelSource, ServerConfig
from tdm_runtime.errors import CheckpointError
from tests.stock_checkpoints import CASES, save_checkpoint


def test_a_model_of_clips_is_refused_by_name(tmp_path: Path) -> None:
    folder = save_checkpoint(CASES["AnimateDiff-Lightning"], tmp_path / "clips")
    with pytest.raises(CheckpointError, match="is of animatediff, which makes clips; this server offers pictures"):
        check_models(ServerConfig(models=(ModelSource(folder),)))
