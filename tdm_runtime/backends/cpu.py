"""CPU cores, and the CPU features that decide which kernels run."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

KERNEL_FEATURES = ("avx", "amx", "fma", "f16c", "neon", "fp16", "bf16", "i8mm", "dot", "fhm", "sve", "sme")
"""Prefixes of the names of such features, on x86-64 and ARM64. Others, such as cache control, change no result."""
ISA_LIMIT = "ONEDNN_MAX_CPU_ISA"
"""Environment variable that limits the kernels which OpenVINO and torch use."""


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_features() -> tuple[str, ...]:
    """Return the architecture and kernel features of this CPU, and oneDNN's limit if the environment sets one."""
    features = kernel_features(torch.cpu.get_capabilities())
    limit = os.environ.get(ISA_LIMIT)
    return (*features, f"{ISA_LIMIT}={limit}") if limit else features


def kernel_features(capabilities: Mapping[str, object]) -> tuple[str, ...]:
    """Return the part of `torch.cpu.get_capabilities()` that decides on kernels: architecture, then sorted features."""
    features = []
    for name, value in sorted(capabilities.items()):
        if name.startswith(KERNEL_FEATURES) and value:
            features.append(name if value is True else f"{name}={value}")
    return (str(capabilities["architecture"]), *features)
