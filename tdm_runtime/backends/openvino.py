"""OpenVINO backend, the default on CPUs. It compiles one static program for each shape and runs batches in buckets.

A batch runs in parts beside each other, each on its share of the threads. Threads that share a part wait for each other
after every layer, parts only at the end. The bits are the same.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tdm_runtime.backends import Precision
from tdm_runtime.backends.buckets import MAX_BATCH_BUCKET, in_buckets
from tdm_runtime.backends.cpu import cores, cpu_features
from tdm_runtime.errors import BackendError

if TYPE_CHECKING:
    import openvino

MAX_PADDING = 0.125
"""Largest share of padding in a call. A CPU's time grows with the batch, so 7 samples run as 8, but 5 as 4 and 1."""
LARGE_BYTES = 512 * 2**20
"""Bytes of weights above which samples run alone. A program holds its own copy of the weights, and a CPU takes as long
for a batch of a large model as for its samples one by one (SD1.5 at 512x512: 4.0 s for four, 1.0 s for one)."""
MAX_PARTS = 4
"""Most parts of a batch. Each has its own working memory, and takes time to compile."""
LARGE_PROGRAMS = 2
"""Most picture sizes of a large model that stay compiled."""


class OpenVINOBackend:
    """Runs an IR or ONNX file on the CPU.

    A sample has the same bits in any batch: programs of different batch sizes sum in the same order.
    """

    device = torch.device("cpu")
    is_batch_invariant = True

    def __init__(self, file: Path, precision: Precision, threads: int | None = None, num_outputs: int = 1) -> None:
        """
        Args:
            file: IR or ONNX file; weights of an IR lie beside it.
            precision: Precision of the arithmetic. In int8 files layers that are not quantised use `precision_hint`.
            threads: CPU threads of a call; None uses all cores.
            num_outputs: Outputs of the interface; those after them in the file are not read.

        Raises:
            BackendError: The file cannot be opened, or the CPU lacks the precision.
        """
        self._model = _opened(file)
        weights = file.with_suffix(".bin")
        self._is_large = weights.is_file() and weights.stat().st_size > LARGE_BYTES
        self._config = {
            "PERFORMANCE_HINT": "LATENCY",
            # Fewer threads than cores leave cores to other processes, which would pin theirs to the same first ones.
            "ENABLE_CPU_PINNING": threads is None or threads >= cores(),
            "INFERENCE_PRECISION_HINT": precision_hint(precision, has_bf16(), has_amx_int8()),
            **({"INFERENCE_NUM_THREADS": threads} if threads else {}),
        }
        self._threads = threads or cores()
        self._num_outputs = num_outputs
        self._programs: OrderedDict[tuple[tuple[int, ...], ...], _Program] = OrderedDict()

    def __call__(self, *inputs: Tensor) -> Tensor:
        def run(part: Sequence[Tensor]) -> Tensor:
            parts = 1 if self._is_large else parts_of(len(part[0]), self._threads)
            return self._run(part, 1, parts)[0]

        return in_buckets(run, inputs, MAX_PADDING, 1 if self._is_large else MAX_BATCH_BUCKET)

    def outputs(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return every output; the inputs are one call."""
        return self._run(inputs, self._num_outputs, parts=1)

    def _run(self, inputs: Sequence[Tensor], num_outputs: int, parts: int) -> tuple[Tensor, ...]:
        shapes = tuple(tuple(tensor.shape) for tensor in inputs)
        if shapes not in self._programs:
            if self._is_large and len(self._programs) == LARGE_PROGRAMS:
                self._programs.popitem(last=False)
            self._programs[shapes] = self._compiled(shapes, parts)
        self._programs.move_to_end(shapes)
        return self._programs[shapes](inputs, num_outputs)

    def _compiled(self, shapes: tuple[tuple[int, ...], ...], parts: int) -> _Program:
        model = self._model.clone()
        part_shapes = [[shape[0] // parts, *shape[1:]] if parts > 1 else list(shape) for shape in shapes]
        model.reshape(dict(zip(model.inputs, part_shapes, strict=True)))
        config = self._config | ({"NUM_STREAMS": parts} if parts > 1 else {})
        try:
            compiled = _core().compile_model(model, "CPU", config)
        except RuntimeError as error:
            raise BackendError(f"OpenVINO cannot compile a program for {shapes}: {error}") from None
        return _Program([compiled.create_infer_request() for _ in range(parts)])


def parts_of(batch_size: int, threads: int) -> int:
    """Return the number of parts in which a batch runs: a power of two with as many threads for each part.

    Args:
        batch_size: Samples, a power of two.
        threads: Threads that all parts share.
    """
    return min(batch_size, threads & -threads, MAX_PARTS)


class _Program:
    """A compiled program with memory for each part. Copying small arrays costs less than passing new ones at a call."""

    def __init__(self, requests: Sequence[openvino.InferRequest]) -> None:
        self._requests = requests
        # NumPy arrays, because torch forbids writing to an inference-mode tensor outside inference mode.
        self._inputs = [[tensor.data for tensor in request.input_tensors] for request in requests]
        self._outputs = [[tensor.data for tensor in request.output_tensors] for request in requests]

    def __call__(self, inputs: Sequence[Tensor], num_outputs: int) -> tuple[Tensor, ...]:
        given = [_split(tensor.numpy(), len(self._requests)) for tensor in inputs]
        with ExitStack() as running:
            for request, own, part in zip(self._requests, self._inputs, zip(*given, strict=True), strict=True):
                for array, value in zip(own, part, strict=True):
                    np.copyto(array, value)
                request.start_async()
                running.callback(request.wait)
        outputs = [*zip(*self._outputs, strict=True)][:num_outputs]
        return tuple(torch.from_numpy(_joined(parts)) for parts in outputs)


def _split(array: np.ndarray, parts: int) -> Sequence[np.ndarray]:
    return np.split(array, parts) if parts > 1 else [array]


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Return the parts in one array. It is a copy, because the next call overwrites them."""
    return np.concatenate(parts) if len(parts) > 1 else parts[0].copy()


@cache
def has_bf16() -> bool:
    """Whether the CPU computes in bfloat16; True without OpenVINO, which then is what a build lacks."""
    try:
        core = _core()
    except ImportError:
        return True
    return "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def has_amx_int8() -> bool:
    """Whether the CPU has AMX's int8 instructions."""
    return "amx_int8" in cpu_features()


@cache
def _core() -> Any:
    import openvino

    return openvino.Core()


def _opened(file: Path) -> Any:
    try:
        return _core().read_model(file)
    except ImportError:
        raise BackendError("openvino is not installed; `pip install openvino`") from None
    except RuntimeError as error:
        raise BackendError(
            f"OpenVINO cannot read {file}: {str(error).splitlines()[0]}; run `tdm-export` again"
        ) from None


def precision_hint(precision: Precision, has_bf16: bool, has_amx_int8: bool) -> str:
    """Return the precision of the layers that are not quantised.

    On CPUs with AMX, int8 kernels are inaccurate beside bf16 (28 dB PSNR) and accurate beside float32 (37 dB).

    Args:
        precision: Requested precision.
        has_bf16: Whether the CPU computes in bfloat16.
        has_amx_int8: Whether the CPU has AMX's int8 instructions.

    Raises:
        BackendError: The CPU lacks the precision.
    """
    if precision == "fp32":
        return "f32"
    if precision == "int8":
        return "bf16" if has_bf16 and not has_amx_int8 else "f32"
    if precision != "bf16":
        raise BackendError(f"openvino does not run {precision} on a CPU; choose fp32, bf16 or int8")
    if not has_bf16:
        raise BackendError("this CPU has no bfloat16 arithmetic; choose fp32 or int8")
    return "bf16"
