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

    return {torch.ops.aten.squeeze.dim: squeeze}


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
