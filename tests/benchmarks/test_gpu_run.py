"""The run for a machine with a GPU: parts end in time, and what one did is kept whatever becomes of the next."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_run import PARTS_FILE, Part, main, parts_of, run


def python(name: str, code: str, share: float = 1) -> Part:
    return Part(name, (sys.executable, "-c", code), share)


def test_parts_run_in_order_and_one_that_hangs_is_stopped_with_all_that_it_started(tmp_path: Path) -> None:
    child = tmp_path / "child"
    hangs = (
        "import subprocess, sys, time; "
        f"subprocess.Popen([sys.executable, '-c', \"import time; time.sleep(4); open({str(child)!r}, 'w')\"]); "
        "time.sleep(60)"
    )
    fails, passes = python("fails", "print('seen'); exit(3)", 15), python("passes", "print('after')", 30)
    results = run([fails, python("hangs", hangs), passes], tmp_path, minutes=1.5)
    assert [(one.name, one.status.split(" after ")[0]) for one in results] == [
        ("fails", "failed (3)"),
        ("hangs", "stopped"),
        ("passes", "passed"),
    ]
    assert (tmp_path / "fails.log").read_text() == "seen\n" and (tmp_path / "passes.log").read_text() == "after\n"
    assert [one["name"] for one in json.loads((tmp_path / PARTS_FILE).read_text())] == ["fails", "hangs", "passes"]
    time.sleep(4)
    assert not child.exists(), "a process of a stopped part went on"


def test_every_part_is_a_command_of_this_repository(tmp_path: Path) -> None:
    for part in parts_of(tmp_path, "cpu", tiny=True):
        assert part.command[:2] == (sys.executable, "-m") and part.share > 0


def test_a_part_that_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--output", str(tmp_path), "--parts", "pictures"])
    assert ended.value.code == 2
    assert "there is no part pictures; the parts are tests, embedded, sd15" in capsys.readouterr().err


def test_the_clip_and_the_training_write_their_figures(tmp_path: Path) -> None:
    """Tiny and on the CPU; a clip has the frames of its latents, and an iteration trains both networks."""
    if torch.cuda.is_available():
        pytest.skip("training takes the GPU; `make gpu` runs it there")
    device = ["--output", str(tmp_path), "--device", "cpu", "--tiny"]
    assert main([*device, "--parts", "clip", "training", "--minutes", "10"]) == 0
    clip = json.loads((tmp_path / "clip.json").read_text())
    assert clip["pixels"] == [1, 9, 64, 64, 3] and clip["steps"] == 4
    assert clip["step_s"] > 0 and clip["decode_s"] > 0
    training = json.loads((tmp_path / "iteration.json").read_text())
    assert training["iteration_s"] > 0 and (training["batch_size"], training["accumulation"]) == (2, 2)
    assert training["losses"]["fake_norm"] > 0 and training["losses"]["student_norm"] > 0


@pytest.mark.slow
@pytest.mark.timeout(2000)  # a little more than the command may take
def test_the_parts_run_on_a_cpu_with_tiny_models(tmp_path: Path) -> None:
    assert main(["--output", str(tmp_path), "--device", "cpu", "--tiny", "--minutes", "30"]) == 0
