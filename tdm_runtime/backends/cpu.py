"""The CPU's features that decide which kernels run on it."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

KERNEL_FEATURES = ("avx", "amx", "fma", "f16c", "neon", "fp16", "bf16", "i8mm", "dot", "fhm", "sve", "sme")
"""How the names of such features begin, on x86-64 and on ARM64; others, as cache control, change no number."""
ISA_LIMIT = "ONEDNN_MAX_CPU_ISA"
"""Environment variable that keeps OpenVINO and torch from kernels that the CPU has."""


def cpu_features() -> tuple[str, ...]:
    """Architecture and kernel features of this CPU, with oneDNN's limit on them where the environment sets one."""
    features = kernel_features(torch.cpu.get_capabilities())
    limit = os.environ.get(ISA_LIMIT)
    return (*features, f"{ISA_LIMIT}={limit}") if limit else features


def kernel_features(capabilities: Mapping[str, object]) -> tuple[str, ...]:
    """The part of `torch.cpu.get_capabilities()` that decides on kernels: the architecture, then names in order."""
    features = []
    for name, value in sorted(capabilities.items()):
        if name.startswith(KERNEL_FEATURES) and value:
            features.append(name if value is True else f"{name}={value}")
    return (str(capabilities["architecture"]), *features)
