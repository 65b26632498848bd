"""A component as an ONNX file, through torch.export."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from export.errors import ExportError
from export.traceable import traceable, translations
from tdm_runtime.backends.interface import Interface, TensorSpec

OPSET = 20
EXAMPLE_SIZES: Mapping[str, int] = {"batch": 2, "height": 16, "width": 24, "frames": 3, "tokens": 24}
"""Sizes a component is traced with, all different: a size that is baked in shows at the next shape."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class _Positional(nn.Module):
    """Exactly the interface's inputs, in its order: what is left out is None. Computes in `dtype`."""

    def __init__(self, module: nn.Module, interface: Interface, dtype: torch.dtype) -> None:
        super().__init__()
        self.module = module
        self._specs = interface.inputs
        self._kept_float32 = interface.kept_float32
        self._dtype = dtype

    def forward(self, *inputs: Tensor) -> Tensor:
        """float32 in and out, whatever the arithmetic."""
        self._tie_sizes(inputs)
        named = {spec.name: self._cast(tensor, spec) for spec, tensor in zip(self._specs, inputs, strict=True)}
        output: Tensor = self.module(**named)
        return output.float() if output.is_floating_point() else output

    def _cast(self, tensor: Tensor, spec: TensorSpec) -> Tensor:
        return tensor.to(self._dtype) if spec.dtype == "float32" and spec.name not in self._kept_float32 else tensor

    def _tie_sizes(self, inputs: Sequence[Tensor]) -> None:
        """Say that sizes of one name are equal: torch.export gives every axis a symbol of its own."""
        first: dict[str, int] = {}
        for tensor, spec in zip(inputs, self._specs, strict=True):
            for axis, name in _named_axes(spec).items():
                size = tensor.shape[axis]
                torch._check(size == first.setdefault(name, size))  # type: ignore[no-untyped-call]


def export_onnx(
    module: nn.Module,
    interface: Interface,
    file: Path,
    *,
    sizes: Mapping[str, int] = EXAMPLE_SIZES,
    title: str,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write `file` and, beside it, its weights as `file` + ".data".

    The file takes and gives float32 whatever `dtype` is, so a caller need not know it.

    Args:
        sizes: of the example that is traced; every size the interface names.
        title: written into the file's metadata and named in errors.
        dtype: of weights and arithmetic. float16 and bfloat16 are for GPUs; the module itself is left as it is.

    Raises:
        ExportError: naming the component and the operator or shape that cannot be exported.
    """
    if dtype not in DTYPES:
        raise ExportError(f"{title}: dtype is {dtype}; use one of {', '.join(map(str, DTYPES))}")
    inputs = interface.random_inputs(sizes, torch.Generator().manual_seed(0))
    axes = tuple(_named_axes(spec) for spec in interface.inputs)
    dynamic = tuple(dict.fromkeys(names, torch.export.Dim.DYNAMIC) for names in axes)
    try:
        with _quiet(), torch.no_grad(), traceable(module), _weights_in(module, dtype):
            wrapped = _Positional(module, interface, dtype).eval()
            traced = torch.export.export(wrapped, inputs, dynamic_shapes=(dynamic,), strict=False)
            _check_sizes_are_free(traced, interface)
            program = torch.onnx.export(
                traced,
                dynamo=True,
                dynamic_shapes=(axes,),  # the names of the axes in the file
                input_names=[spec.name for spec in interface.inputs],
                output_names=[interface.output.name],
                opset_version=OPSET,
                custom_translation_table=translations(),
                verbose=False,
            )
            assert program is not None
            program.model.metadata_props.update(
                {"tdm.component": title, "tdm.dtype": str(dtype).removeprefix("torch.")}
            )
            program.save(str(file), external_data=True)
    except Exception as error:  # torch.export and onnxscript raise many kinds; all mean the same to a user
        raise ExportError(f"{title} cannot be exported to ONNX: {_reason(error)}") from error


def _named_axes(spec: TensorSpec) -> dict[int, str]:
    """The axes that may differ from call to call."""
    return {axis: size for axis, size in enumerate(spec.shape) if isinstance(size, str)}


def _check_sizes_are_free(program: ExportedProgram, interface: Interface) -> None:
    """Check that nothing computed from a size was written down as a number.

    torch.export notices where an input's own size is fixed; that half of it is, it only notes down.

    Raises:
        ValueError: naming the size.
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
    """The last cause's first lines: where torch.export names the operator or the guard."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3])[:400] or type(error).__name__


@contextlib.contextmanager
def _weights_in(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """The module's float32 weights in another type within the block, the very same ones after it."""
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
    """Without the exporter's own account of its progress."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
