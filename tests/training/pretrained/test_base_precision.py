"""A base held in bf16 under LoRA adapters: same results as in float32, half the memory, and exact resumes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.training.run.killed import assert_resumes
from tests.training.tiny_runs import LORA, NOISE, iterate, tiny_distiller, weights_of
from training.config import DistillConfig
from training.methods.roles import CleanEstimator
from training.run.distill import Distiller, distill

QUICK = ("stable_diffusion", "flux", "z_image")
HALF = replace(LORA, precision="bf16", base_precision="bf16")


@pytest.fixture(autouse=True)
def _bf16_on_every_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)  # else a float32 base runs in float32


def iterated(family: str, config: DistillConfig) -> tuple[dict[str, Tensor], Distiller]:
    distiller = tiny_distiller(family, config)
    iterate(distiller, 2)
    return weights_of(distiller), distiller


@pytest.mark.parametrize(
    "family", [pytest.param(family, marks=() if family in QUICK else pytest.mark.slow) for family in NOISE]
)
def test_a_base_in_bf16_trains_the_same_adapters_bit_for_bit(family: str) -> None:
    before = weights_of(tiny_distiller(family, HALF))
    expected, _ = iterated(family, replace(HALF, base_precision="fp32"))
    found, distiller = iterated(family, HALF)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    moved = [name for name in before if not torch.equal(before[name], found[name])]
    assert len(moved) > 0.9 * len(before), "gradients must reach the adapters"
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    student = distiller.roles.student
    assert isinstance(student, CleanEstimator)
    layers = {p.dtype for name, p in student.denoiser.named_parameters() if name.endswith("to_q.base_layer.weight")}
    assert layers == {torch.bfloat16}


def test_it_runs_in_bf16_also_without_the_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    (numbers,) = iterate(tiny_distiller("z_image", HALF), 1)
    assert numbers["student_norm"] > 0


def test_it_resumes_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(HALF, steps=3, save_every_s=0.0)
    assert_resumes(lambda folder: distill(folder, tiny_distiller("z_image", config)), tmp_path, monkeypatch)
