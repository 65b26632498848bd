"""Export of a component to an ONNX file, through torch.export."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from export.errors import ExportError
from export.traceable import traceable, translations
from tdm_runtime.backends.interface import Interface, TensorSpec, name_and_factor

OPSET = 20
EXAMPLE_SIZES: Mapping[str, int] = {"batch": 2, "height": 16, "width": 24, "frames": 3, "tokens": 24}
"""Sizes that a component is traced with. All differ, so that a size baked into the program is noticed."""
MAX_MULTIPLIED = 4096
"""Largest value of a size that is declared with a factor."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class _Positional(nn.Module):
    """Wrapper that takes exactly the inputs of the interface, in its order, and computes in `dtype`."""

    def __init__(self, module: nn.Module, interface: Interface, dtype: torch.dtype) -> None:
        super().__init__()
        self.module = module
        self._specs = interface.inputs
        self._kept_float32 = interface.kept_float32
        self._dtype = dtype

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Call the module. Inputs and outputs are float32, whatever `dtype` is."""
        self._tie_sizes(inputs)
        named = {spec.name: self._cast(tensor, spec) for spec, tensor in zip(self._specs, inputs, strict=True)}
        output: Tensor | tuple[Tensor, ...] = self.module(**named)
        outputs = (output,) if isinstance(output, Tensor) else output
        return tuple(tensor.float() if tensor.is_floating_point() else tensor for tensor in outputs)

    def _cast(self, tensor: Tensor, spec: TensorSpec) -> Tensor:
        return tensor.to(self._dtype) if spec.dtype == "float32" and spec.name not in self._kept_float32 else tensor

    def _tie_sizes(self, inputs: Sequence[Tensor]) -> None:
        """Declare that sizes with the same name are equal, because torch.export gives every axis its own symbol.

        A multiple comes after its size, or is divisible.
        """
        first: dict[str, int] = {}
        for tensor, spec in zip(inputs, self._specs, strict=True):
            for axis, size_name in _named_axes(spec).items():
                name, factor = name_and_factor(size_name)
                size = tensor.shape[axis]
                torch._check(size == factor * first.setdefault(name, size // factor))  # type: ignore[no-untyped-call]


def export_onnx(
    module: nn.Module,
    interface: Interface,
    file: Path,
    *,
    sizes: Mapping[str, int] = EXAMPLE_SIZES,
    title: str,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write `file`, and its weights beside it as `file` + ".data".

    Inputs and outputs of the file are float32 whatever `dtype` is, so callers need not know it.

    Args:
        sizes: value of every size of the interface, for the traced example.
        title: name of the component, for the metadata of the file and for errors.
        dtype: type of weights and arithmetic. float16 and bfloat16 are for GPUs. The module itself is not changed.

    Raises:
        ExportError: an operator or shape cannot be exported; the message names it and the component.
    """
    if dtype not in DTYPES:
        raise ExportError(f"{title}: dtype is {dtype}; use one of {', '.join(map(str, DTYPES))}")
    inputs = interface.random_inputs(sizes, torch.Generator().manual_seed(0))
    axes = tuple(_named_axes(spec) for spec in interface.inputs)
    dynamic = _dynamic_shapes(axes)
    try:
        with _quiet(), torch.no_grad(), traceable(module), _weights_in(module, dtype):
            wrapped = _Positional(module, interface, dtype).eval()
            traced = torch.export.export(wrapped, inputs, dynamic_shapes=(dynamic,), strict=False)
            _check_sizes_are_free(traced, interface)
            program = torch.onnx.export(
                traced,
                dynamo=True,
                dynamic_shapes=(axes,),  # names of the axes in the file
                input_names=[spec.name for spec in interface.inputs],
                output_names=[spec.name for spec in interface.outputs],
                opset_version=OPSET,
                custom_translation_table=translations(),
                verbose=False,
            )
            assert program is not None
            program.model.metadata_props.update(
                {"tdm.component": title, "tdm.dtype": str(dtype).removeprefix("torch.")}
            )
            program.save(str(file), external_data=True)
    except Exception as error:  # torch.export and onnxscript raise many types of errors
        raise ExportError(f"{title} cannot be exported to ONNX: {_reason(error)}") from error


def _named_axes(spec: TensorSpec) -> dict[int, str]:
    """Return axis -> name of the axes that may differ from call to call."""
    return {axis: size for axis, size in enumerate(spec.shape) if isinstance(size, str)}


def _dynamic_shapes(axes: Sequence[Mapping[int, str]]) -> tuple[dict[int, Any], ...]:
    """Return what torch.export reads about the axes of each input.

    A size whose multiple comes before it, or alone, is declared with its factor. Otherwise nothing would say that the
    multiple is divisible.
    """
    declared: dict[str, Any] = {}
    for size_name in (size for names in axes for size in names.values()):
        name, factor = name_and_factor(size_name)
        if name not in declared:
            declared[name] = torch.export.Dim.DYNAMIC if factor == 1 else torch.export.Dim(name, max=MAX_MULTIPLIED)
    return tuple({axis: _dimension(size, declared) for axis, size in names.items()} for names in axes)


def _dimension(size_name: str, declared: Mapping[str, Any]) -> Any:
    name, factor = name_and_factor(size_name)
    known = declared[name]
    return torch.export.Dim.DYNAMIC if known is torch.export.Dim.DYNAMIC else factor * known


def _check_sizes_are_free(program: ExportedProgram, interface: Interface) -> None:
    """Check that no value computed from a size became a constant.

    torch.export fails if the size of an input becomes a constant, but for half of that size it only adds a guard.

    Raises:
        ValueError: a size became a constant; the message names it.
    """
    names: dict[sympy.Basic, sympy.Symbol] = {}
    shape_env = None
    placeholders = [node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs]
    for node, spec in zip(placeholders, interface.inputs, strict=True):
        for axis, name in _named_axes(spec).items():
            size = node.meta["val"].shape[axis].node
            names[size.expr] = sympy.Symbol(name)
            shape_env = size.shape_env
    if shape_env is None:
        return
    for guard in shape_env.guards:
        expression = guard.expr.xreplace(shape_env.replacements).xreplace(names)
        if isinstance(expression, sympy.Eq) and any(side.is_Integer and side > 0 for side in expression.args):
            raise ValueError(f"the traced program holds only where {expression.lhs} is {expression.rhs}")


def _reason(error: BaseException) -> str:
    """Return the first lines of the root cause, where torch.export names the operator or the guard."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3])[:400] or type(error).__name__


@contextlib.contextmanager
def _weights_in(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Convert the module's weights to `dtype` within the block, and restore the original tensors after it."""
    owners = [
        (part, name, weight)
        for part in module.modules()
        for name, weight in part.named_parameters(recurse=False)
        if weight.dtype.is_floating_point and weight.dtype != dtype
    ]
    cast = {id(weight): nn.Parameter(weight.detach().to(dtype), requires_grad=False) for _, _, weight in owners}
    try:
        for part, name, weight in owners:
            setattr(part, name, cast[id(weight)])
        yield
    finally:
        for part, name, weight in owners:
            setattr(part, name, weight)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's progress output within the block."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
