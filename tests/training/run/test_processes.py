"""Runs give the same weights for any number of processes and accumulated parts, and after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.ports import free_port
from tests.training.run.killed import tensors_of
from tests.training.run.small_run import KINDS, run
from training.run.loop import LOG_FILE, STATE_FILE
from training.run.processes import Processes

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = "tests.training.run.small_run"
STEPS = 3
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def assert_close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Check equality up to the order of sums, which AdamW can turn into a small share of its rate, 1e-3 and more."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-2, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


def launch(tmp_path: Path, steps: int) -> None:
    """Run two processes on the CPU. accelerate starts several with `--multi_gpu`, and always one with `--cpu`."""
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    settings = ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1"]
    meeting = ["--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port())]
    program = ["--module", PROGRAM, *KINDS, "--folder", str(tmp_path), "--steps", str(steps)]
    command = [sys.executable, *launcher, *settings, *meeting, *program]
    loopback = {**ONE_THREAD, "GLOO_SOCKET_IFNAME": "lo"}
    subprocess.run(command, check=True, cwd=ROOT, env=loopback, timeout=120)


def test_two_processes_train_as_one_and_stay_equal(tmp_path: Path) -> None:
    launch(tmp_path, STEPS)
    for kind in KINDS:
        first, second = (load_file(tmp_path / kind / f"rank-{rank}.safetensors") for rank in (0, 1))
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert_close(first, run(kind, tmp_path / f"{kind}-alone", STEPS))
        lines = (tmp_path / kind / LOG_FILE).read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [1, 2, 3], "only one process may write the log"


@pytest.mark.parametrize("kind", KINDS)
def test_accumulated_parts_train_as_one_batch(kind: str, tmp_path: Path) -> None:
    assert_close(run(kind, tmp_path / "two", STEPS, accumulation=2), run(kind, tmp_path / "one", STEPS))


def test_a_batch_size_that_parts_do_not_divide_is_rejected() -> None:
    with pytest.raises(ValueError, match="batch_size 6 cannot be cut into 1 processes x 4 accumulated parts; take a"):
        Processes().parts(6, 4)


def test_sigkill_and_resume_give_the_weights_of_an_uninterrupted_run(tmp_path: Path) -> None:
    steps = 60
    command = [sys.executable, "-m", PROGRAM, "mixture", "--folder", str(tmp_path / "out"), "--steps", str(steps)]
    killed = tmp_path / "out" / "mixture"
    with subprocess.Popen(command, cwd=ROOT, env=ONE_THREAD, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while logged_steps(killed) < 5 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert 4 <= torch.load(killed / STATE_FILE, weights_only=True)["step"] < steps
    run("mixture", killed, steps)
    run("mixture", tmp_path / "peace", steps)
    expected, resumed = tensors_of(tmp_path / "peace"), tensors_of(killed)
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)


def logged_steps(folder: Path) -> int:
    log = folder / LOG_FILE
    return len(log.read_text().splitlines()) if log.is_file() else 0
