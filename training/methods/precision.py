"""The number format of training."""

from __future__ import annotations

from typing import Literal

import torch

Precision = Literal["bf16", "fp32"]


def autocast(device: torch.device | str = "cpu", precision: Precision = "bf16") -> torch.autocast:
    """Return an autocast to bf16 if the device has instructions for it (about twice as fast), otherwise to nothing."""
    kind = torch.device(device).type
    can = torch.cuda.is_bf16_supported() if kind == "cuda" else torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(kind, torch.bfloat16, enabled=precision == "bf16" and can)
