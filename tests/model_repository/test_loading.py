"""A Triton model that cannot be served says why when it is loaded."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.model_repository.triton_server import TritonServer, copy_repository
from tests.stock_checkpoints import CASES, save_checkpoint


@pytest.mark.parametrize(
    ("name", "reason"),
    [("empty", r"empty.*model_index\.json"), ("clips", "clips makes clips, and this model pictures")],
)
def test_the_reason_of_a_failed_load_is_in_the_log(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "empty").mkdir()
    save_checkpoint(CASES["AnimateDiff-Lightning"], tmp_path / "clips")
    server = TritonServer(copy_repository(tmp_path / "models", {"checkpoint": str(tmp_path / name)}), tmp_path / "log")
    with pytest.raises(RuntimeError, match="not ready"):
        server.wait_until_ready()
    assert re.search(reason, server.log.read_text())
    assert server.process.poll() not in (None, 0)
