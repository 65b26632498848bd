"""TensorRT: plans that `tdm-export` built from ONNX files, for one GPU architecture and version of a TensorRT library.

No plan has run yet: tests build plans with tensorrt-rtx and load them without a GPU, which ends in the errors below.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
import torch
from torch import Tensor

from tdm_runtime.backends import Precision
from tdm_runtime.backends.cuda_graphs import cuda_stream, side_stream
from tdm_runtime.backends.interface import Interface
from tdm_runtime.backends.machine import gpu_architecture
from tdm_runtime.backends.tensorrt_library import Package, import_tensorrt, loaded_plan, parser_errors
from tdm_runtime.errors import ArtifactError, BackendError

SizeRange = tuple[int, int, int]
"""Smallest, best and largest value of a size. Any value between runs; the best runs fastest."""


@dataclass(frozen=True)
class BuiltFor:
    """Machine and sizes that a plan was built for, in a file beside it: a plan must be loaded before it tells them."""

    library: Package
    """Library that built the plan; the other one cannot run it."""
    version: str
    """Version of the library; a plan runs only on the version that built it."""
    gpu: str
    """Compute capability, as "sm_90"."""
    precision: Precision
    sizes: Mapping[str, SizeRange]
    """Name of a size of the interface -> the range that the plan takes."""

    def save(self, plan: Path) -> None:
        """Write the file beside the plan."""
        built_for_file(plan).write_bytes(_ADAPTER.dump_json(self, indent=2) + b"\n")

    @classmethod
    def load(cls, plan: Path) -> BuiltFor:
        """Read the file beside the plan.

        Raises:
            ArtifactError: it is missing or broken.
        """
        try:
            return _ADAPTER.validate_json(built_for_file(plan).read_bytes())
        except (OSError, pydantic.ValidationError) as error:
            reason = str(error).splitlines()[0]
            raise ArtifactError(f"{built_for_file(plan)} cannot be read ({reason}); run `tdm-export` again") from None

    def check_machine(self, plan: Path, version: str, gpu: str | None) -> None:
        """Check that a plan was built for a version of its library and for a GPU.

        Raises:
            ArtifactError: naming what it was built for, what is here and what to run.
        """
        if version != self.version or gpu != self.gpu:
            raise ArtifactError(
                f"{plan} was built for {self.gpu} with {self.library} {self.version}; this machine has "
                f"{gpu or 'no CUDA device'} with {self.library} {version}; run `tdm-export` again for this machine"
            )

    def check_sizes(self, plan: Path, sizes: Mapping[str, int]) -> None:
        """Check that a call's sizes are among those that a plan takes.

        Raises:
            BackendError: naming the size, what the plan takes and the remedy.
        """
        for name, size in sizes.items():
            least, _, greatest = self.sizes[name]
            if not least <= size <= greatest:
                raise BackendError(
                    f"{name} is {size}; {plan} takes {least} to {greatest}: run `tdm-export` again with a wider range"
                )


_ADAPTER = pydantic.TypeAdapter(BuiltFor)


def built_for_file(plan: Path) -> Path:
    """Return the file that holds `BuiltFor`."""
    return plan.with_name(plan.name + ".json")


class TensorRTBackend:
    """Runs a plan on its own stream: on torch's default stream, TensorRT would wait for the GPU twice a call."""

    is_batch_invariant = False

    def __init__(self, file: Path, interface: Interface, device: torch.device) -> None:
        """
        Raises:
            BackendError: the library that built the plan is not installed, or GPU memory is out.
            ArtifactError: the plan was built for another version or GPU, or is damaged.
        """
        self.device = device
        self._file = file
        self._interface = interface
        self._built_for = BuiltFor.load(file)
        self._library = import_tensorrt(self._built_for.library)
        self._built_for.check_machine(file, self._library.version, gpu_architecture())
        self._seen: set[tuple[tuple[int, ...], ...]] = set()
        with torch.cuda.device(device):
            self._log = self._library.log()
            self._plan = loaded_plan(self._library, file, self._log)
            self._context, self._kernels = self._library.context(self._plan, file, self._log)
            self._stream = cuda_stream(device)

    def __call__(self, *inputs: Tensor) -> Tensor:
        most = self._built_for.sizes["batch"][2]
        with torch.cuda.device(self.device), side_stream(self._stream):
            starts = range(0, len(inputs[0]), most)
            outputs = [self._run([tensor[start : start + most] for tensor in inputs])[0] for start in starts]
            return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def outputs(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return every output; the inputs are one call."""
        with torch.cuda.device(self.device), side_stream(self._stream):
            return self._run(inputs)

    def _run(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        inputs = [tensor.contiguous() for tensor in inputs]  # the name keeps copies alive for the call
        shapes = [tuple(tensor.shape) for tensor in inputs]
        self._built_for.check_sizes(self._file, sizes_of(self._interface, shapes))
        for spec, tensor, shape in zip(self._interface.inputs, inputs, shapes, strict=True):
            assert tensor.dtype == getattr(torch, spec.dtype), f"{spec.name} is {tensor.dtype}, not {spec.dtype}"
            self._must(self._context.set_input_shape(spec.name, shape))
            self._must(self._context.set_tensor_address(spec.name, tensor.data_ptr()))
        self._must(not self._context.infer_shapes())
        outputs = []
        for spec in self._interface.outputs:
            shape = tuple(self._context.get_tensor_shape(spec.name))
            outputs.append(torch.empty(shape, dtype=getattr(torch, spec.dtype), device=self.device))
            self._must(self._context.set_tensor_address(spec.name, outputs[-1].data_ptr()))
        self._must(self._context.execute_async_v3(self._stream.cuda_stream))
        self._keep_kernels(tuple(shapes))
        return tuple(outputs)

    def _keep_kernels(self, shapes: tuple[tuple[int, ...], ...]) -> None:
        """Write the compiled kernels after the first call of each shape."""
        if self._kernels is not None and shapes not in self._seen:
            self._seen.add(shapes)
            self._kernels.save()

    def refit(self, onnx_file: Path) -> None:
        """Take the weights of another ONNX file of the same graph, as after merging a LoRA. No call may run meanwhile.

        Raises:
            ArtifactError: the plan is not refittable, or the file is of another graph.
        """
        with torch.cuda.device(self.device):
            torch.cuda.synchronize()
            refit(self._library.module, self._plan, onnx_file, self._log)

    def _must(self, succeeded: bool) -> None:
        if not succeeded:
            raise BackendError(f"TensorRT cannot run {self._file}: {self._log.last}")


def refit(trt: Any, plan: Any, onnx_file: Path, log: Any) -> None:
    """Replace all weights of a loaded plan by those of an ONNX file.

    Args:
        trt: module of the library that loaded the plan.
        plan: `ICudaEngine`.
        log: of `TensorRT.log`, that the plan was loaded with.

    Raises:
        ArtifactError: the plan is not refittable, or the file is of another graph.
    """
    if not plan.refittable:
        raise ArtifactError(f"the plan {plan.name!r} keeps its weights: it was built without a GPU; build it on one")
    refitter = trt.Refitter(plan, log)
    parser = trt.OnnxParserRefitter(refitter, log)
    if not parser.refit_from_file(str(onnx_file)):
        raise ArtifactError(
            f"{onnx_file} does not fit the plan: {parser_errors(parser)}; export it as the plan's own file was"
        )
    if missing := refitter.get_missing_weights():
        raise ArtifactError(f"{onnx_file} lacks {len(missing)} weights that go with others, as {missing[0]}")
    if not refitter.refit_cuda_engine():
        raise ArtifactError(f"{onnx_file} cannot be taken: {log.last}; load the plan again, it may be half changed")


def sizes_of(interface: Interface, shapes: Sequence[Sequence[int]]) -> dict[str, int]:
    """Return the value of each size that an interface names, from the input shapes of a call."""
    named = interface.size_names
    return {
        name: size
        for spec, shape in zip(interface.inputs, shapes, strict=True)
        for name, size in zip(spec.shape, shape, strict=True)
        if isinstance(name, str) and name in named
    }
