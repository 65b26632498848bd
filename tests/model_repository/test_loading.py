"""A Triton model that cannot be served says why when it is loaded."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.model_repository.triton_server import TritonServer, copy_repository


def test_the_reason_of_a_failed_load_is_in_the_log(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    parameters = {"checkpoint": str(tmp_path / "empty")}
    server = TritonServer(copy_repository(tmp_path / "models", parameters), tmp_path / "log")
    with pytest.raises(RuntimeError, match="not ready"):
        server.wait_until_ready()
    assert re.search(r"empty.*model_index\.json", server.log.read_text())
    assert server.process.poll() not in (None, 0)
