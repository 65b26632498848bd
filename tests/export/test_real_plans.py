"""The script of full-size plans, on small models: its stages build a plan, and a stage that passes a limit is named."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from export.real_plans import PROGRAMS, bounded, build_stage, export_stage, main, table
from tdm_runtime.families.architectures import REAL_SIZES


def test_the_stages_of_a_small_decoder_build_a_plan(tmp_path: Path) -> None:
    real = REAL_SIZES["sd15"]["decoder"]
    small = replace(real, config={**real.config, "block_out_channels": (32, 32), "norm_num_groups": 8})
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    small = replace(small, config={**small.config, **blocks}, sizes={"batch": 1, "height": 16, "width": 24})
    figures = export_stage(small, tmp_path, "sm_89") | build_stage(small, tmp_path, "sm_89")
    assert figures["plan_bytes"] == (tmp_path / "model.plan").stat().st_size > figures["parameters"]
    assert figures["max_batch"] == 8 and figures["library"].startswith("tensorrt")
    assert figures["parse_s"] > 0 and figures["build_s"] > 0
    peaks = {"export_peak_bytes": 2**30, "build_peak_bytes": 2**31}
    one = {"model": "sd15", "program": "decoder", "gpu": "sm_89", **figures, **peaks}
    header, rule, row, stopped = table(
        [one, one | {"stopped": "build: the time limit after 9 s, 1.0 GiB"}]
    ).splitlines()
    assert header.count("|") == rule.count("|") == row.count("|") == stopped.count("|")
    assert "| 1.0 |" in row and "| 2.0 |" in row and "build: the time limit" in stopped


@pytest.mark.parametrize(
    ("code", "max_s", "max_mib", "says"),
    [
        ("import time; time.sleep(60)", 0.3, 1000, "the time limit"),
        ("import time; held = b'1' * 2**27; time.sleep(60)", 60, 100, "the memory limit"),
        ("exit(3)", 60, 1000, "exit status 3"),
    ],
)
def test_a_stage_that_fails_or_passes_a_limit_is_stopped(code: str, max_s: float, max_mib: int, says: str) -> None:
    peak, seconds, answer, stopped = bounded([sys.executable, "-c", code], max_s, max_mib * 2**20)
    assert stopped == says and answer == {} and seconds < 30
    assert says != "the memory limit" or peak > max_mib * 2**20


def test_every_program_is_known_and_another_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert all(program in REAL_SIZES[model] for model, program in PROGRAMS)
    with pytest.raises(SystemExit):
        main(["sd15", "encoder", "--output", str(tmp_path)])
    assert "sd15 encoder is not known; choose from sd15 denoiser, sd15 decoder" in capsys.readouterr().err
