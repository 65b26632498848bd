"""Ways to run a component: callables of one signature, each in its own file, heavy imports inside.

torch (eager), torch-compiled and cuda-graphs run the checkpoint's own modules; onnxruntime, openvino
and tensorrt run what `tdm-export` built of them.
"""

from __future__ import annotations

import sys
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

BackendName = Literal["torch", "torch-compiled", "cuda-graphs", "onnxruntime", "openvino", "tensorrt"]
Precision = Literal["fp32", "bf16", "fp16", "int8", "fp8"]
BACKENDS: tuple[BackendName, ...] = get_args(BackendName)
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# openvino and nncf report to Google Analytics when they are imported, unless they lack the module that does it.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]


class Backend(Protocol):
    """One component, ready to run.

    Called with the tensors of the component's `Interface`, all on `device`, all with the same batch
    size; returns a tensor that the caller owns. Not thread-safe: one thread calls at a time.
    """

    device: torch.device
    is_batch_invariant: bool
    """Whether a sample's output has the same bits at every batch size."""

    def __call__(self, *inputs: Tensor) -> Tensor: ...
