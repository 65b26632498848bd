"""`tdm-serve` refuses at start what could not be served, in one sentence."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from serving.cli import main
from tdm_runtime.recipe import RECIPE_FILE
from tests.serving.conftest import free_port

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 2
    message = capsys.readouterr().err
    assert message.startswith("tdm-serve: ")
    assert "Traceback" not in message
    return message


def test_a_missing_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is not a folder" in refusal(capsys, "--checkpoint", str(tmp_path / "none"))


def test_a_damaged_checkpoint(checkpoint_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(checkpoint_folder, folder)
    with (folder / WEIGHTS).open("r+b") as stream:
        stream.seek(100_000)
        stream.write(b"\0\1\2\3")
    message = refusal(capsys, "--checkpoint", str(folder))
    assert WEIGHTS in message
    assert "restore" in message


def test_a_port_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"127.0.0.1:{port}" in refusal(capsys, "--port", str(port))


def test_what_only_loading_shows(checkpoint_folder: Path, tmp_path: Path) -> None:
    """A recipe that contradicts the weights is found by the replica, and the command says so and ends."""
    folder = shutil.copytree(checkpoint_folder, tmp_path / "contradiction")
    recipe = json.loads((folder / RECIPE_FILE).read_text())
    (folder / RECIPE_FILE).write_text(json.dumps(recipe | {"step_condition": "none"}))
    command = [sys.executable, "-m", "serving.cli", "--port", str(free_port()), "--checkpoint", str(folder)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 2
    assert "tdm-serve: the server could not start: " in ended.stderr
    assert "recipe and weights are not of one training run" in ended.stderr


@pytest.mark.parametrize(
    "arguments",
    [["--port", "0"], ["--port", "70000"], ["--threads", "-1"], ["--max-batch-size", "0"], ["--max-live", "0"]],
)
def test_values_out_of_range(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert arguments[1] in capsys.readouterr().err
