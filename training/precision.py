"""One place that decides the arithmetic of training, which runs on the CPU."""

from __future__ import annotations

import torch


def autocast() -> torch.autocast:
    """bf16 where the processor has instructions for it (about twice as fast), fp32 elsewhere."""
    return torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported())
