"""Torch backends run calls with optional inputs, and compile none of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tdm_runtime.backends.interface import Interface, TensorSpec
from tdm_runtime.backends.pytorch import CompiledTorchBackend, TorchBackend

LATENTS, EXTRA = (TensorSpec(name, "float32", ("batch", 4)) for name in ("latents", "extra"))
INTERFACE = Interface((LATENTS,), LATENTS, optional_inputs=(EXTRA,))


class Sum(nn.Module):
    def forward(self, latents: Tensor, other: Tensor | None = None, extra: Tensor | None = None) -> Tensor:
        return latents if extra is None else latents + extra


def test_an_optional_input_is_passed_by_its_name() -> None:
    backend = TorchBackend(Sum(), torch.device("cpu"), interface=INTERFACE)
    ones = torch.ones(2, 4)
    assert torch.equal(backend(ones), ones) and torch.equal(backend(ones, ones), 2 * ones)


def test_a_call_with_optional_inputs_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[int] = []

    def compile_(module: nn.Module, **options: object) -> object:
        return lambda **inputs: compiled.append(len(inputs)) or module(**inputs)

    monkeypatch.setattr(torch, "compile", compile_)
    backend = CompiledTorchBackend(Sum(), torch.device("cpu"), interface=INTERFACE)
    ones = torch.ones(2, 4)
    assert torch.equal(backend(ones, ones), 2 * ones) and not compiled
    assert torch.equal(backend(ones), ones) and compiled == [1]
