"""Updates of LyCORIS as plain LoRAs of a higher rank. Both forms are exact, so readers of LoRAs need no other kind.

Each function takes the tensors of one layer by LyCORIS' names and returns A, B and the scale that the rank implies.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from tdm_runtime.errors import CheckpointError

_NAME = re.compile(r"(?P<layer>.+)\.(?P<tensor>hada_\w+|lokr_\w+|lora_mid\.weight)", re.ASCII)


def as_low_rank(file: Path, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a file with `lora_down`, `lora_up` and alpha in place of LoHa, LoKr and `lora_mid`.

    Args:
        file: file that errors name.

    Raises:
        CheckpointError: a layer has a form that is not read here.
    """
    plain = dict(state)
    layers = {match["layer"] for name in state if (match := _NAME.fullmatch(name))}
    for layer in sorted(layers):
        prefix = f"{layer}."
        tensors = {name.removeprefix(prefix): plain.pop(name) for name in state if name.startswith(prefix)}
        alpha = tensors.pop("alpha", None)
        try:
            down, up, rank = _low_rank({name: tensor.float() for name, tensor in tensors.items()})
        except (KeyError, RuntimeError):
            raise CheckpointError(
                f"{file} changes {layer[:100]!r} by {', '.join(sorted(tensors))[:100]}, a form of LyCORIS that is not "
                "read; merge it into its base"
            ) from None
        scale = 1.0 if alpha is None or rank is None else float(alpha) / rank
        plain |= {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up}
        plain[f"{layer}.alpha"] = torch.tensor(scale * down.shape[0])
    return plain


def _low_rank(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor, int | None]:
    """Return A, B and the rank that alpha is divided by; None where LyCORIS ignores alpha."""
    match sorted(tensors):
        case ["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"]:
            return _hadamard(*(tensors[f"hada_{name}"] for name in ("w1_a", "w1_b", "w2_a", "w2_b")))
        case ["lora_down.weight", "lora_mid.weight", "lora_up.weight"]:
            down, mid = tensors["lora_down.weight"], tensors["lora_mid.weight"]
            return torch.einsum("rshw,si->rihw", mid, down.flatten(1)), tensors["lora_up.weight"], len(down)
        case _:
            return _kronecker(tensors)


def _hadamard(w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor) -> tuple[Tensor, Tensor, int]:
    """Factor (w1_a w1_b) * (w2_a w2_b), the update of LoHa, with all pairs of columns and of rows (rank r * r)."""
    down = torch.einsum("ri,si->rsi", w1_b, w2_b).flatten(0, 1)
    up = torch.einsum("or,os->ors", w1_a, w2_a).flatten(1)
    return down, up, len(w1_b)


def _kronecker(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor, int | None]:
    """Factor w1 (x) w2, the update of LoKr, as (w1 (x) up of w2) (I (x) down of w2)."""
    rank = None
    if "lokr_w1" not in tensors:
        rank = len(tensors["lokr_w1_b"])
        tensors["lokr_w1"] = tensors.pop("lokr_w1_a") @ tensors.pop("lokr_w1_b")
    w1 = tensors.pop("lokr_w1")
    if "lokr_w2" in tensors:
        down = tensors.pop("lokr_w2")
        up = torch.eye(len(down))
    else:
        up, down = tensors.pop("lokr_w2_a"), tensors.pop("lokr_w2_b")
        rank = len(down)
    if tensors:
        raise KeyError(min(tensors))
    columns = w1.shape[1]
    identity = torch.eye(columns).reshape(columns, columns, *(1,) * (down.ndim - 2))
    return torch.kron(identity, down), torch.kron(w1, up), rank
