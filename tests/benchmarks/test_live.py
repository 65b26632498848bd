"""`tdm-bench live` on a real server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.cli import main
from tests.serving.conftest import RunningServer


def test_pictures_follow_a_stroke_over_the_websocket_and_over_http(
    tdm_server: RunningServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--duration-s", "1.5", "--num-inference-steps", "1", "--output", str(tmp_path / "live.json")]
    assert main(["live", "--base-url", tdm_server.url, *flags]) == 0, capsys.readouterr().err
    rows = json.loads((tmp_path / "live.json").read_text())["rows"]
    assert [row["way"] for row in rows] == ["websocket", "http"]
    for row in rows:
        assert row["pictures_per_s"] > 0 and 0 < row["p50_ms"] <= row["p99_ms"]
    assert rows[1]["answered_share"] == 1.0 >= rows[0]["answered_share"] > 0


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--strength", "2"], "strength is 2.0"),
        (["--model", "nothing"], "; --model names one of them"),
        (["--size", "9"], "write WIDTHxHEIGHT"),
        (["--message-rate", "0"], "'0' is out of range"),
    ],
)
def test_a_wrong_flag_is_a_sentence(
    tdm_server: RunningServer, flags: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main(["live", "--base-url", tdm_server.url, "--duration-s", "0.3", *flags])
    except SystemExit as ended:
        status = int(str(ended.code))
    assert status == 2
    said = capsys.readouterr().err
    assert said.startswith("tdm-bench live: ") and sentence in said
