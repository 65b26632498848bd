"""The script that measures every backend: a trial on the CPU, and a run on a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from export.accelerator import Part, main
from export.accelerator_report import REPORT_FILE, TABLE_FILE
from tdm_runtime.backends.interface import Interface, TensorSpec


def report_of(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))
    return report


def run(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    assert main(["--output", str(folder), "--tiny", "--rounds", "2", *arguments]) == 0
    return list(report_of(folder)["rows"])


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(16, 8))

    def forward(self, latents: Tensor) -> Tensor:
        return nn.functional.linear(latents, self.weight)


def test_flops_count_the_matrix_products() -> None:
    interface = Interface(
        (TensorSpec("latents", "float32", ("batch", "height", 8)),),
        TensorSpec("output", "float32", ("batch", "height", 16)),
    )
    assert Part(Product(), interface, {"height": 5}).flops(3) == 2 * 3 * 5 * 8 * 16


def test_torch_is_measured_and_missing_backends_give_a_reason(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("on a GPU nothing is missing")
    rows = run(
        tmp_path,
        "--device",
        "cpu",
        "--models",
        "sd15",
        "--batches",
        "3",
        "--backends",
        "torch",
        "cuda-graphs",
        "tensorrt",
    )
    exact = {(row["part"], row["batch"]): row for row in rows if row["way"] == "torch fp32"}
    assert list(exact) == [("text_encoder", 1), ("denoiser", 1), ("denoiser", 3), ("decoder", 1), ("picture", 1)]
    for row in exact.values():
        assert row["relative_l2"] == 0 and row["ms"] > 0 and row["of_ceiling"] > 0
    assert exact["picture", 1]["psnr_db"] == 99
    rounded = [row for row in rows if row["way"] == "torch bf16"]
    assert [row["part"] for row in rounded] == [part for part, _ in exact]
    assert all(0 < row["relative_l2"] < 0.1 for row in rounded)
    reasons = {row["way"]: row["reason"] for row in rows if row["reason"]}
    assert set(reasons) == {"cuda-graphs fp32", "cuda-graphs bf16", "tensorrt bf16", "tensorrt fp16"}
    assert "needs a CUDA device" in reasons["cuda-graphs bf16"] and "no CUDA device" in reasons["tensorrt fp16"]
    text = (tmp_path / TABLE_FILE).read_text(encoding="utf-8")
    assert "| sd15 | torch bf16 | picture | 1 |" in text and "not measured: cuda-graphs was asked for cpu" in text
    assert {path.name for path in tmp_path.iterdir()} == {REPORT_FILE, TABLE_FILE}


@pytest.mark.slow
def test_a_second_run_continues(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    device = ["--device", "cpu", "--models", "sdxl", "--batches", "1", "--precisions", "fp32"]
    first = run(tmp_path, *device, "--backends", "torch")
    both = run(tmp_path, *device, "--backends", "torch", "onnxruntime")
    assert both[: len(first)] == first  # kept, not measured again
    added = [row for row in both if row["way"] == "onnxruntime fp32"]
    assert [row["part"] for row in added] == ["denoiser", "decoder", "picture"]
    assert all(row["relative_l2"] < 1e-3 for row in added)
    environment = report_of(tmp_path)["environment"]
    assert environment["torch"] == torch.__version__ and environment["rounds"] == "2"


def test_without_cuda_the_error_names_the_flags_for_a_trial(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(SystemExit):
        main(["--output", str(tmp_path)])
    assert "--device cpu --tiny" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_backend_is_measured_on_a_gpu(tmp_path: Path) -> None:
    """Backends with a missing library give a reason instead."""
    rows = run(tmp_path, "--batches", "1", "3")
    for row in rows:
        if row["way"].split()[0] in ("torch", "torch-compiled", "cuda-graphs"):
            assert not row["reason"], row
        if not row["reason"]:
            assert row["relative_l2"] < 0.1 and row["ms"] > 0
    assert {row["model"] for row in rows} == {"embedded", "sd15", "sdxl"}
