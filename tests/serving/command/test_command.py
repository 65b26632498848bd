"""`tdm-serve` refuses bad settings at start, with one sentence."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from serving.command.checks import check_artifacts
from serving.command.cli import main
from serving.config import ServerConfig
from serving.telemetry.logs import set_up_logging
from tdm_runtime.checkpoint.folder import open_checkpoint
from tdm_runtime.checkpoint.manifest import default_artifacts, load_manifest
from tdm_runtime.checkpoint.recipe import RECIPE_FILE
from tdm_runtime.errors import ArtifactError
from tdm_runtime.model.artifacts import BackendConfig
from tests.ports import free_port

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 2
    message = capsys.readouterr().err
    assert message.startswith("tdm-serve: ")
    assert "Traceback" not in message
    return message


def test_a_missing_checkpoint_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is not a folder" in refusal(capsys, "--checkpoint", str(tmp_path / "none"))


def test_a_damaged_checkpoint_is_refused(
    checkpoint_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(checkpoint_folder, folder)
    with (folder / WEIGHTS).open("r+b") as stream:
        stream.seek(100_000)
        stream.write(b"\0\1\2\3")
    message = refusal(capsys, "--checkpoint", str(folder))
    assert WEIGHTS in message
    assert "restore" in message


def test_a_lora_of_another_base_is_refused_before_the_start(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "lora.safetensors"
    halves = {"lora_A": torch.ones(2, 4, 3, 3), "lora_B": torch.ones(8, 2, 1, 1)}
    save_file({f"unet.conv_elsewhere.{half}.weight": tensor for half, tensor in halves.items()}, file)
    message = refusal(capsys, "--checkpoint", str(tiny_checkpoint), "--lora", f"other={file}")
    assert f"{file} changes 'conv_elsewhere', which this base does not have" in message and message.count("\n") == 1


def test_a_port_in_use_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"127.0.0.1:{port}" in refusal(capsys, "--port", str(port))


@pytest.mark.slow  # half a minute: it tries to build artifacts, then starts a server
def test_an_error_that_only_loading_finds_ends_the_command(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """A recipe that contradicts the weights can be neither built nor loaded. The command says so and ends."""
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "contradiction")
    recipe = json.loads((folder / RECIPE_FILE).read_text())
    (folder / RECIPE_FILE).write_text(json.dumps(recipe | {"step_condition": "none"}))
    command = [sys.executable, "-m", "serving.command.cli", "--port", str(free_port()), "--checkpoint", str(folder)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 2
    assert "the artifacts could not be built, see above; serving with torch" in ended.stdout
    assert "tdm-serve: the server could not start: " in ended.stderr
    assert "recipe and weights are not of one training run" in ended.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["--port", "0"],
        ["--port", "70000"],
        ["--threads", "-1"],
        ["--max-batch-size", "0"],
        ["--max-live", "0"],
        ["--artifact-ttl-hours", "0"],
        ["--artifact-ttl-hours", "nan"],
        ["--public-url", "images.example.org"],
        ["--backend", "abacus"],
        ["--precision", "fp12"],
        ["--precision", "int8", "--backend", "torch"],
        ["--artifacts", "/built", "--backend", "torch"],
    ],
    ids=" ".join,
)
def test_a_bad_value_is_refused_by_name(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert arguments[1] in capsys.readouterr().err


def test_an_unusable_place_for_jobs_or_files_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    folder = ["--state-folder", str(tmp_path / "state")]
    assert "file" in refusal(capsys, "--state-folder", str(tmp_path / "file"))
    assert "nosuch" in refusal(capsys, *folder, "--artifacts-url", "nosuch://bucket")
    message = refusal(capsys, *folder, "--database-url", "nosuch://ann:secret@host/jobs")
    assert "see --database-url" in message and "secret" not in message


# -- artifacts -------------------------------------------------------------------------------------


def test_an_artifacts_folder_without_a_manifest_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(capsys, "--port", str(free_port()), "--artifacts", str(tmp_path))
    assert f"{tmp_path / 'manifest.json'} cannot be read" in message
    assert f"--output {tmp_path}`" in message


def test_artifacts_of_another_checkpoint_are_refused(tiny_artifacts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(capsys, "--port", str(free_port()), "--artifacts", str(tiny_artifacts), "--backend", "openvino")
    assert f"{tiny_artifacts} was built from" in message
    assert f"--output {tiny_artifacts}`" in message


def test_artifacts_without_the_requested_backend_are_refused(
    tiny_checkpoint: Path, tiny_artifacts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command adds nothing to a folder that the user named."""
    arguments = ["--port", str(free_port()), "--checkpoint", str(tiny_checkpoint), "--artifacts", str(tiny_artifacts)]
    message = refusal(capsys, *arguments, "--backend", "tensorrt", "--precision", "bf16")
    assert "was not built for tensorrt bf16" in message
    assert f"--output {tiny_artifacts} --backend tensorrt --precision bf16`" in message


def test_a_precision_that_the_backend_does_not_have_is_refused(
    tiny_checkpoint: Path, cache_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--port", str(free_port()), "--checkpoint", str(tiny_checkpoint)]
    assert main([*arguments, "--backend", "openvino", "--precision", "fp16"]) == 2
    message = capfd.readouterr().err
    assert "tdm-export: error: openvino is built at bf16, fp32, int8" in message
    assert message.splitlines()[-1].startswith("tdm-serve: the artifacts could not be built, see above")


@pytest.mark.skipif(torch.cuda.is_available(), reason="providers of a GPU may run here")
def test_a_provider_that_cannot_run_here_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--port", str(free_port()), "--backend", "onnxruntime", "--allow-fallback", "--provider"]
    for provider in ("cuda", "nv-tensorrt-rtx"):
        message = refusal(capsys, *arguments, provider)
        assert "onnxruntime" in message and "--provider cpu" in message


def test_unusable_artifacts_are_accepted_only_with_allow_fallback(
    tiny_checkpoint: Path, tiny_artifacts: Path, tmp_path: Path
) -> None:
    """The replica then loads torch and logs why."""
    checkpoint = open_checkpoint(tiny_checkpoint)
    lacking = BackendConfig("tensorrt", artifacts=tiny_artifacts)
    for config in (lacking, BackendConfig("auto", artifacts=tmp_path)):
        with pytest.raises(ArtifactError):
            check_artifacts(checkpoint, config)
        check_artifacts(checkpoint, replace(config, allow_fallback=True))


def test_missing_artifacts_are_built_once(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    set_up_logging(ServerConfig())
    checkpoint, config = open_checkpoint(tiny_checkpoint), BackendConfig("onnxruntime")
    check_artifacts(checkpoint, config)
    assert f"building {checkpoint.recipe.name} for this machine, once" in capsys.readouterr().out
    (build,) = load_manifest(default_artifacts(checkpoint), checkpoint).builds
    assert build.name == "onnxruntime fp32"
    assert tuple(build.pictures) == checkpoint.recipe.step_counts
    check_artifacts(checkpoint, config)
    assert capsys.readouterr().out == ""
