"""Packages and GPU of this machine, which decide what can be built and run."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable

import torch

TOOLS = (
    "torch",
    "diffusers",
    "transformers",
    "onnx",
    "onnxscript",
    "openvino",
    "nncf",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx",
)
"""Packages whose version may change what is built."""


def installed(packages: Iterable[str]) -> dict[str, str]:
    """Return package -> version, for those packages that are installed."""
    versions = {}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def gpu_architecture() -> str | None:
    """Return the compute capability of the CUDA device, such as "sm_90"; None without one."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"
