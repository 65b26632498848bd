"""Opens a component with the backend of a name: a compiled file, or a module of the checkpoint.

A new backend is a file beside this one, a name in `BackendName` and a case here.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from tdm_runtime.backends import Backend, BackendName, Precision, Provider
from tdm_runtime.backends.interface import Interface
from tdm_runtime.errors import ArtifactError


def open_file(
    backend: BackendName,
    file: Path,
    interface: Interface,
    precision: Precision,
    threads: int | None = None,
    provider: Provider | None = None,
) -> Backend:
    """Open a file that `tdm-export` built.

    Args:
        threads: CPU threads of a call; None lets the backend choose.
        provider: of onnxruntime; None is cuda if torch finds a GPU, or else cpu.

    Raises:
        ArtifactError: the file is damaged or was built for something else, or the backend runs no files.
        BackendError: the backend cannot run here.
    """
    match backend:
        case "openvino":
            from tdm_runtime.backends.openvino import OpenVINOBackend

            return OpenVINOBackend(file, precision, threads, len(interface.outputs))
        case "onnxruntime":
            from tdm_runtime.backends.onnxruntime import OnnxRuntimeBackend, provider_device

            return OnnxRuntimeBackend(file, interface, provider_device(provider), threads, provider)
        case "tensorrt":
            from tdm_runtime.backends.tensorrt import TensorRTBackend

            return TensorRTBackend(file, interface, torch.device("cuda"))
    raise ArtifactError(f"{file} is a build for {backend!r}, which runs no files; run `tdm-export` again")


def open_module(
    backend: BackendName,
    module: nn.Module,
    interface: Interface,
    device: torch.device,
    dtype: torch.dtype,
    threads: int | None = None,
) -> Backend:
    """Run a module of the checkpoint; it is moved and converted in place.

    Args:
        backend: One of `TORCH_BACKENDS`.
        threads: CPU threads of a call; None leaves the setting of the calling thread alone.

    Raises:
        BackendError: the backend cannot run on this device.
    """
    from tdm_runtime.backends.pytorch import CompiledTorchBackend, TorchBackend

    if backend == "torch":
        return TorchBackend(module, device, dtype, threads, interface)
    if backend == "torch-compiled":
        return CompiledTorchBackend(module, device, dtype, threads, interface)
    from tdm_runtime.backends.cuda_graphs import CudaGraphBackend

    return CudaGraphBackend(module, device, dtype, interface)
