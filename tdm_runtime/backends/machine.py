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


def gpu_name() -> str:
    """Return the CUDA device's name and the CUDA version of its driver; "no CUDA device" without one."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    driver = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]
    return f"{torch.cuda.get_device_name()}, driver for CUDA {driver}"


def gpu_architecture() -> str | None:
    """Return the compute capability of the CUDA device, such as "sm_90"; None without one."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"
