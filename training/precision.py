"""One place that decides the arithmetic of training."""

from __future__ import annotations

import torch


def autocast() -> torch.autocast:
    """bf16 where the processor has instructions for it (about twice as fast), fp32 elsewhere."""
    has_bf16 = torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported()
    return torch.autocast("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16, enabled=has_bf16)
