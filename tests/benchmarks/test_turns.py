"""`tdm-bench turns` with a real server beside the engine."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.cli import main
from benchmarks.contenders import Contender
from benchmarks.turns import Suspended

SMALL_SERVER = "tests.benchmarks.small_server"
COUNT = "n = 0\nwhile True:\n    n += 1"


def test_contenders_take_turns(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = Contender(
        "fastapi_lock ours",
        SMALL_SERVER,
        ("--backend", "ours", "--checkpoint", str(tiny_checkpoint)),
        "/health",
        "ours",
    )
    monkeypatch.setattr("benchmarks.turns.all_contenders", lambda *_: [peer])
    monkeypatch.setattr("benchmarks.turns.interpreter_in", lambda folder: sys.executable)
    flags = ["--checkpoint", str(tiny_checkpoint), "--backend", "torch", "--threads", "1", "--logs", str(tmp_path)]
    flags += ["--rounds", "2", "--turn-s", "0.2", "--max-concurrency", "1,2", "--output", str(tmp_path / "turns.json")]
    assert main(["turns", "fastapi_lock ours", "engine in process", *flags]) == 0, capsys.readouterr().err
    found = json.loads((tmp_path / "turns.json").read_text())["rounds"]
    assert list(found) == ["fastapi_lock ours", "engine in process"]
    for turns in found.values():
        assert [len(turns[number]) for number in ("1", "2")] == [2, 2]
        assert all(turn["pictures_per_s"] > 0 and turn["p50_ms"] > 0 for rounds in turns.values() for turn in rounds)
    said = capsys.readouterr().out
    assert "| 1 | fastapi_lock ours |" in said and "| 2 | engine in process |" in said


def test_a_suspended_process_does_nothing() -> None:
    with psutil.Popen([sys.executable, "-c", COUNT]) as process:
        suspended = Suspended([psutil.Process(process.pid)])
        suspended.suspend()
        while process.status() != psutil.STATUS_STOPPED:
            time.sleep(0.01)
        before_s = process.cpu_times().user
        time.sleep(0.3)
        assert process.cpu_times().user == before_s
        with suspended.awake():
            time.sleep(0.3)
        assert process.cpu_times().user > before_s
        suspended.resume()
        process.kill()


def test_an_unknown_contender_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["turns", "nothing"])
    assert "there is no contender 'nothing'; choose from bentoml_service ours" in capsys.readouterr().err
