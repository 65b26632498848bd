"""`tdm-serve` refuses settings of text encoders that it cannot honour, before it listens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from serving.command.arguments import parse_arguments
from tdm_runtime.cli import main as tdm_generate
from tests.lora_files import draw_weights, write_diffusers
from tests.serving.command.test_command import refusal
from tests.stock_checkpoints import CASES, save_checkpoint, stock_pipeline


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(CASES["SDXL-Lightning"], tmp_path_factory.mktemp("sdxl") / "folder")


def test_a_lora_that_changes_a_text_encoder_at_int8_is_refused(
    sdxl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = stock_pipeline(CASES["SDXL-Lightning"])
    lora = write_diffusers(pipeline, tmp_path / "lora", draw_weights(pipeline, "sdxl", 1))
    arguments = ["--checkpoint", str(sdxl), "--lora", f"fox={lora}", "--text-encoder-precision", "int8"]
    message = refusal(capsys, *arguments, "--backend", "torch")
    assert "fox changes text_encoder, and text encoders at int8 take no LoRA; choose another" in message


@pytest.mark.skipif(torch.cuda.device_count() > 99, reason="needs a device that is not there")
def test_a_device_that_is_not_there_is_refused(sdxl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--checkpoint", str(sdxl), "--text-encoder-device", "cuda:99", "--backend", "torch"]
    assert "--text-encoder-device is cuda:99 and this machine has" in refusal(capsys, *arguments)
    assert tdm_generate(["a fox", *arguments, "-o", str(tmp_path / "fox.png")]) == 2
    assert "--text-encoder-device is cuda:99" in capsys.readouterr().err


def test_an_unknown_device_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse_arguments(["--text-encoder-device", "tpu"])
    assert "'tpu' is no device; give cpu, cuda or cuda:N" in capsys.readouterr().err
