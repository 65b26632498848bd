"""Modules in a form that torch.export can follow, with the same results.

The models compute some things in Python from the sizes of their inputs (positional embeddings, crops). torch.export
would write the numbers of the traced size into the graph as constants, or stop. `traceable` replaces such methods
during an export by ones that compute the same in tensors; each family states its own (`Family.replacement`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from tdm_runtime.families import FAMILIES


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return ATen operators with the functions that write them in place of the exporter's own."""
    from onnxscript import opset20 as op

    def squeeze(tensor: Any, dim: int) -> Any:
        """PixArt squeezes its tokens, of which there are several: torch ignores that, ONNX refuses it."""
        return op.Squeeze(tensor, op.Constant(value_ints=[dim])) if tensor.shape[dim] == 1 else op.Identity(tensor)

    def repeat_interleave(tensor: Any, repeats: Any, dim: int | None = None, output_size: Any = None) -> Any:
        """AnimateDiff repeats a row for each frame: of a number that changes, the exporter's own takes another axis."""
        if dim is None:
            tensor, dim = op.Reshape(tensor, op.Constant(value_ints=[-1])), 0
        rank = len(tensor.shape)
        axis = dim % rank
        is_fixed = isinstance(repeats, int)
        count = op.Constant(value_ints=[repeats]) if is_fixed else op.Reshape(repeats, op.Constant(value_ints=[-1]))
        after = [op.Constant(value_ints=[1] * (rank - axis - 1))] if axis + 1 < rank else []
        repeated = op.Expand(
            op.Unsqueeze(tensor, op.Constant(value_ints=[axis + 1])),
            op.Concat(op.Constant(value_ints=[1] * (axis + 1)), count, *after, axis=0),
        )
        joined = op.Constant(value_ints=[-1])
        shape = op.Concat(op.Shape(tensor, start=0, end=axis), joined, op.Shape(tensor, start=axis + 1), axis=0)
        return op.Reshape(repeated, shape)

    aten = torch.ops.aten
    return {aten.squeeze.dim: squeeze, aten.repeat_interleave.self_int: repeat_interleave}


@contextmanager
def traceable(module: nn.Module) -> Iterator[None]:
    """Replace, within the block, the methods that torch.export cannot follow."""
    with ExitStack() as stack:
        for part in module.modules():
            if (replacement := _replacement(part)) is not None:
                stack.enter_context(_replaced(part, *replacement))
        yield


def _replacement(part: nn.Module) -> tuple[str, Any] | None:
    """Return the attribute of a module that is replaced, and its value."""
    found = (family.replacement(part) for family in FAMILIES.values())
    return next((replacement for replacement in found if replacement is not None), None)


@contextmanager
def _replaced(part: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Replace an attribute of one instance within the block."""
    own = {key: part.__dict__[key] for key in [name] if key in part.__dict__}
    part.__dict__[name] = value
    try:
        yield
    finally:
        del part.__dict__[name]
        part.__dict__.update(own)
