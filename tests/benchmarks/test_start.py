"""`tdm-bench start` with a real server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.cli import main
from benchmarks.start import RAY, ROLES


def test_a_start_is_measured(tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = f"--checkpoint {tiny_checkpoint} --backend torch --threads 1 --state-folder {tmp_path}"
    flags = ["--repetitions", "1", "--idle-s", "1", "--output", str(tmp_path / "start.json")]
    assert main(["start", "--server-args", arguments, *flags]) == 0, capsys.readouterr().err
    (row,) = json.loads((tmp_path / "start.json").read_text())["starts"]
    assert row["ready_s"] > 1 and row["first_picture_ms"] > 0
    for role in (*ROLES.values(), RAY):
        assert row[f"{role}_mib"] > 20 and row[f"{role}_idle_cpu_percent"] >= 0


def test_a_server_that_does_not_start_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["start", "--repetitions", "1", "--server-args", "--checkpoint /nowhere"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("tdm-bench start: ") and "/nowhere" in said
