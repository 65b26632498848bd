"""`tdm-bench turns` with a real server beside the engine."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest

from benchmarks.cli import main
from benchmarks.contenders import Contender
from benchmarks.turns import Suspended, best_peer

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
    flags = ["--checkpoint", str(tiny_checkpoint), "--backend", "torch", "--threads", "1", "--logs", str(tmp_path)]
    flags += ["--rounds", "2", "--turn-s", "0.2", "--max-concurrency", "1,2", "--output", str(tmp_path / "turns.json")]
    flags += ["--loads", "0.5,2"]
    assert main(["turns", "fastapi_lock ours", "engine in process", *flags]) == 0, capsys.readouterr().err
    found = json.loads((tmp_path / "turns.json").read_text())["rounds"]
    assert list(found) == ["fastapi_lock ours", "engine in process"]
    for turns in found.values():
        assert [len(turns[number]) for number in ("1", "2")] == [2, 2]
        figures = ("pictures_per_s", "p50_ms", "p99_ms", "cpu_ms")
        assert all(turn[name] > 0 for name in figures for rounds in turns.values() for turn in rounds)
    loads = json.loads((tmp_path / "turns.json").read_text())["loads"]
    assert list(loads) == ["fastapi_lock ours"], "the engine is no server"
    for turns in loads["fastapi_lock ours"].values():
        assert len(turns) == 2 and all(0 <= turn["goodput_share"] <= 1 for turn in turns)
    said = capsys.readouterr().out
    assert "| 50% | fastapi_lock ours |" in said and "| 200% | fastapi_lock ours |" in said
    assert "| 1 | fastapi_lock ours |" in said and "| 2 | engine in process |" in said


def test_a_suspended_process_does_nothing() -> None:
    with psutil.Popen([sys.executable, "-c", COUNT]) as process:
        suspended = Suspended([psutil.Process(process.pid)])
        suspended.suspend()
        while process.status() != psutil.STATUS_STOPPED:
            time.sleep(0.01)
        before_s = suspended.cpu_s()
        time.sleep(0.3)
        assert suspended.cpu_s() == before_s
        with suspended.awake():
            time.sleep(0.3)
        assert suspended.cpu_s() > before_s
        suspended.resume()
        process.kill()


def test_an_unknown_contender_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["turns", "nothing"])
    assert "there is no contender 'nothing'; choose from bentoml_service ours" in capsys.readouterr().err


def test_loads_need_a_peer(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["turns", "tdm-serve", "--loads", "0.8"])
    assert "--loads are shares of what a peer makes; name a peer" in capsys.readouterr().err


def test_the_best_peer_makes_the_most_pictures_at_any_number_in_flight() -> None:
    def turns(*rates: float) -> list[Mapping[str, float]]:
        return [{"pictures_per_s": rate, "p50_ms": 1e3 / rate, "p99_ms": 0.0} for rate in rates]

    slow, quick = {1: turns(10, 10, 10), 16: turns(20, 20, 20)}, {1: turns(4, 5, 6), 16: turns(30, 1, 31)}
    found = best_peer({"tdm-serve": {1: turns(99), 16: turns(99)}, "slow": slow, "quick": quick})
    assert found == {"name": "quick", "throughput": 30, "unloaded_ms": 200}
    assert best_peer({"tdm-serve": slow}) == {}
