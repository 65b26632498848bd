"""On a CUDA device, distillation steps change the weights as on the CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from accelerate import PartialState

from tests.training.tiny_runs import NOISE, UNIFY, tiny_distiller
from training.run.distill import Distiller
from training.run.loop import step_generator

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def trained(distiller: Distiller, steps: int = 2) -> list[torch.Tensor]:
    for step in range(steps):
        numbers = distiller.train_step(step, step_generator(0, "cuda", step))
        assert all(torch.isfinite(torch.tensor(value)) for value in numbers.values())
    return [p.detach().cpu() for p in distiller.roles.module("student").parameters()]


@pytest.mark.parametrize("family", NOISE)
@pytest.mark.parametrize("lora_rank", [0, 4])
def test_a_family_trains_on_cuda(family: str, lora_rank: int) -> None:
    config = replace(UNIFY, lora_rank=lora_rank, precision="bf16")
    distiller = tiny_distiller(family, config)  # type: ignore[arg-type]
    assert distiller.device.type == "cuda"
    trained(distiller)


def test_cuda_and_cpu_train_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without TF32: its convolutions round to 10 bits, and some of the weights then differ by more than this."""
    for owner in (torch.backends.cuda.matmul, torch.backends.cudnn):
        monkeypatch.setattr(owner, "allow_tf32", False)
    config = replace(UNIFY, precision="fp32")
    on_cuda = trained(tiny_distiller("stable_diffusion", config))
    PartialState._reset_state()  # it keeps the device of the first use
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        on_cpu = trained(tiny_distiller("stable_diffusion", config))
    PartialState._reset_state()
    for first, second in zip(on_cuda, on_cpu, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-2, atol=1e-3)
