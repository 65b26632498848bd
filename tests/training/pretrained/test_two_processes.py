"""Every preset's family in two processes that SIGKILL ends: the resumed run gives the model of an undisturbed one.

The commands are those of `accelerate launch`, which only sets the variables of `PLACE` and starts processes; here a
fork server does, so that each command need not import everything.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from tdm_runtime.checkpoint.recipe import load_recipe
from tdm_runtime.cli import main as tdm_generate
from tests.ports import free_port
from training.cli import main
from training.config import config_as_toml
from training.pretrained.presets import PRESETS
from training.run.loop import LOG_FILE

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["training.cli", "training.pretrained.train", "peft", "tests.tiny_pipelines"])
FAMILY = {
    "sd15": "stable_diffusion",
    "sdxl": "sdxl",
    "pixart-alpha": "pixart",
    "sd3-medium": "sd3",
    "flux-dev": "flux",
    "flux2-klein-base-4b": "flux2",
    "z-image": "z_image",
    "cogvideox-2b": "cogvideox",
    "wan-1.3b": "wan",
}
QUICK = ("z-image",)
STEPS = 5


def command(rank: int, port: int, arguments: Sequence[str], errors: Path) -> None:
    """Run `tdm-train` as one of two processes."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()} | {"GLOO_SOCKET_IFNAME": "lo"})
    sys.stderr = errors.with_suffix(f".{rank}").open("w")
    sys.exit(main(["--threads", "1", *arguments]))


def start(arguments: Sequence[str], tmp_path: Path) -> list[BaseProcess]:
    port = free_port()
    started = [FORKS.Process(target=command, args=(rank, port, arguments, tmp_path / "errors")) for rank in range(2)]
    for process in started:
        process.start()
    return list(started)


def finish(processes: Sequence[BaseProcess], tmp_path: Path) -> None:
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0, 0], [
        file.read_text()[-2000:] for file in tmp_path.glob("errors.*")
    ]


@pytest.mark.parametrize(
    "preset", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILY]
)
def test_two_killed_processes_resume_to_the_same_model_which_is_served(
    preset: str, folders: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = preset in ("cogvideox-2b", "wan-1.3b")
    small = {"steps": STEPS, "batch_size": 4, "accumulation": 1, "width": 64, "height": 64, "frames": 9 if clip else 1}
    config = replace(PRESETS[preset], **small, save_every_s=0.0, log_every=1, teacher_prediction="any")  # type: ignore[arg-type]
    (tmp_path / "config.toml").write_text(config_as_toml(config))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a red fox"}\n{"prompt": "two cats"}\n')

    def distill(run: str) -> list[str]:
        given = {"preset": preset, "base": folders(FAMILY[preset]), "config": tmp_path / "config.toml"}
        given |= {"prompts": tmp_path / "prompts.jsonl", "output": tmp_path / run}
        return ["distill", *(word for name, value in given.items() for word in (f"--{name}", str(value)))]

    processes = start(distill("killed"), tmp_path)
    log = tmp_path / "killed" / LOG_FILE
    deadline = time.monotonic() + 120
    while not (log.is_file() and len(log.read_text().splitlines()) >= 2) and time.monotonic() < deadline:
        assert all(process.is_alive() for process in processes), (tmp_path / "errors.0").read_text()[-2000:]
        time.sleep(0.005)
    for process in processes:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert [process.exitcode for process in processes] == [-signal.SIGKILL] * 2
    assert not (tmp_path / "killed" / "model").exists()
    finish(start(distill("killed"), tmp_path), tmp_path)
    finish(start(distill("peace"), tmp_path), tmp_path)
    resumed, undisturbed = tmp_path / "killed" / "model", tmp_path / "peace" / "model"
    assert load_recipe(resumed).files == load_recipe(undisturbed).files, "hashes of the weights"
    picture = ["--size", "64x64", "-o", str(tmp_path / ("clip.mp4" if clip else "picture.png"))]
    assert tdm_generate(["--checkpoint", str(resumed), "a red fox", *picture]) == 0, capsys.readouterr().err
