"""The number format of training: when it is bf16, and how the faster one is found."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from training.methods import precision
from training.methods.precision import autocast, fastest_precision


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    fastest_precision.cache_clear()
    yield
    fastest_precision.cache_clear()


@pytest.mark.parametrize("has_instructions", [True, False])
def test_bf16_needs_instructions_for_it(monkeypatch: pytest.MonkeyPatch, has_instructions: bool) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_instructions)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: not has_instructions)
    monkeypatch.setattr(torch, "autocast", lambda kind, dtype, enabled: (kind, dtype, enabled))
    assert autocast(torch.device("cpu"), "bf16") == autocast() == ("cpu", torch.bfloat16, has_instructions)
    assert autocast("cuda:1", "bf16") == ("cuda", torch.bfloat16, not has_instructions)
    assert autocast("cpu", "fp32") == ("cpu", torch.bfloat16, False)


@pytest.mark.parametrize(("bf16_s", "fp32_s", "expected"), [(1.0, 2.0, "bf16"), (2.0, 1.0, "fp32")])
def test_the_faster_format_is_the_one_with_the_quickest_run(
    monkeypatch: pytest.MonkeyPatch, bf16_s: float, fp32_s: float, expected: str
) -> None:
    """Each format is timed several times, and once it is slow by chance. The convolution itself is a real one."""
    duration_s = {"bf16": bf16_s, "fp32": fp32_s}
    now, slow, format_of, real = [0.0], [10.0, 10.0], [""], torch.nn.functional.conv2d

    def start(device: str = "cpu", precision: str = "bf16") -> torch.autocast:
        format_of[0] = precision
        return autocast(device, "fp32")

    def convolve(x: torch.Tensor, weight: torch.Tensor, padding: int) -> None:
        assert not torch.is_grad_enabled() and real(x, weight, padding=padding).shape == x.shape
        now[0] += duration_s[format_of[0]] + (slow.pop() if slow else 0.0)

    monkeypatch.setattr(precision, "autocast", start)
    monkeypatch.setattr(precision.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch.nn.functional, "conv2d", convolve)
    assert fastest_precision() == expected
