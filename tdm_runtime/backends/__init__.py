"""Backends run one component each. They share one signature, and each has its own file with its heavy imports."""

from __future__ import annotations

import sys
from typing import Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor

BackendName = Literal["torch", "torch-compiled", "cuda-graphs", "onnxruntime", "openvino", "tensorrt"]
Precision = Literal["fp32", "bf16", "fp16", "int8", "fp8"]
Provider = Literal["cpu", "cuda", "tensorrt", "nv-tensorrt-rtx"]
"""Execution provider of ONNX Runtime."""
BACKENDS: tuple[BackendName, ...] = get_args(BackendName)
TORCH_BACKENDS: tuple[BackendName, ...] = ("torch", "torch-compiled", "cuda-graphs")
"""Backends that run the modules of the checkpoint itself; the others run files that `tdm-export` built."""
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
PROVIDER_NAMES: tuple[Provider, ...] = get_args(Provider)
TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# openvino and nncf report to Google Analytics when they are imported, unless they lack the module that does it.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]


class Backend(Protocol):
    """One component, ready to run.

    It is called with the tensors of the component's `Interface`, all on `device`, all with the same batch
    size; returns a tensor that the caller owns. Not thread-safe: one thread calls at a time.
    """

    device: torch.device
    is_batch_invariant: bool
    """Whether a sample's output has the same bits at every batch size."""

    def __call__(self, *inputs: Tensor) -> Tensor: ...


@runtime_checkable
class ManyOutputs(Backend, Protocol):
    """A backend that also runs programs with further outputs (`Interface.further_outputs`)."""

    def outputs(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return every output. The inputs are one call, so their batch is not cut."""
        ...
