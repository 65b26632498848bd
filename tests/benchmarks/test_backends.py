"""`tdm-bench backends`: contenders that cannot run, and checkpoints written for other projects."""

from __future__ import annotations

import importlib.util
import io
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from benchmarks import backends
from benchmarks.cli import main
from benchmarks.peers import genai, sd_cpp
from tdm_runtime.checkpoint.folder import open_checkpoint
from tdm_runtime.checkpoint.stock.pipeline_folder import read_json

SHORT = ("--rounds", "1", "--pictures", "1", "--warm-up", "1", "--steps", "1")


def test_a_contender_that_cannot_run_is_named_and_the_others_are_measured(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interpreter_of(extra: str) -> str:
        if extra == "peers-genai":
            raise OSError("openvino-genai cannot be installed into build/peers-genai: there is no network")
        return sys.executable

    monkeypatch.setattr(backends, "interpreter_of", interpreter_of)
    contenders = ["openvino-genai:bf16", "sd-cpp:fp16", "torch:fp32"]
    assert main(["backends", str(tiny_checkpoint), "--contenders", *contenders, *SHORT]) == 1
    said = capsys.readouterr().out
    assert "| torch:fp32 |" in said and "| sd-cpp:fp16 |" not in said
    assert "- openvino-genai:bf16: not run: openvino-genai cannot be installed into build/peers-genai: there" in said
    assert "- sd-cpp:fp16: not run: stable-diffusion.cpp runs Stable Diffusion 1.5, but" in said


@pytest.mark.skipif(importlib.util.find_spec("openvino_genai") is not None, reason="openvino-genai is installed")
def test_a_missing_package_is_named_with_what_to_install(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(backends, "interpreter_of", lambda extra: sys.executable)
    assert main(["backends", str(tiny_checkpoint), "--contenders", "openvino-genai", *SHORT]) == 1
    assert "not run: openvino-genai is not installed; `pip install openvino-genai`" in capsys.readouterr().out


def test_an_unknown_precision_is_refused_before_anything_runs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["backends", "--contenders", "openvino-genai:int4"])
    assert "openvino-genai has no precision 'int4'; choose from bf16, fp32, int8" in capsys.readouterr().err


def test_stable_diffusion_cpp_reads_the_same_weights_under_their_published_names(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint)
    width = read_json(tiny_checkpoint / "text_encoder" / "config.json")["hidden_size"]
    monkeypatch.setattr(sd_cpp, "TEXT_WIDTH", width)
    monkeypatch.setattr(sd_cpp, "READABLE", tmp_path)
    folder = sd_cpp.readable_folder(checkpoint)
    ours = load_file(tiny_checkpoint / "text_encoder" / "model.safetensors")
    theirs = load_file(folder / "text_encoder" / "model.safetensors")
    assert set(theirs) == {f"text_model.{name.removeprefix('text_model.')}" for name in ours}
    assert all(theirs[f"text_model.{name.removeprefix('text_model.')}"].equal(ours[name]) for name in ours)
    for part in ("unet", "vae"):
        name = f"{part}/diffusion_pytorch_model.safetensors"
        assert (folder / name).read_bytes() == (tiny_checkpoint / name).read_bytes()
    assert sd_cpp.readable_folder(checkpoint) == folder


@pytest.mark.parametrize("steps", [1, 4])
def test_openvino_genai_makes_the_pictures_of_the_stock_pipeline(
    checkpoint_folder: Path, tmp_path: Path, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino_genai", reason="run it with build/peers-genai/bin/python, which `tdm-bench` makes")
    import torch

    from benchmarks.peers.pipelines import StockPipeline

    monkeypatch.setattr(genai, "CONVERTED", tmp_path)
    theirs, stock = genai.GenAIPipeline(checkpoint_folder, "fp32"), StockPipeline(checkpoint_folder, torch.float32)
    prompts, seeds = ["a red heart", "a blue cat"], [7, 8]
    for png, expected in zip(theirs.make(prompts, seeds, steps), stock.make(prompts, seeds, steps), strict=True):
        difference = _pixels(png) - _pixels(expected)
        assert 10 * np.log10(255**2 / np.mean(difference**2)) > 45, "it rounds pixels down, and nothing else differs"


def _pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png))).astype(float)
