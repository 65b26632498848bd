"""LoRA files in the manner of diffusers, kohya or PEFT."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from tdm_runtime.checkpoint.folder import file_sha256
from tdm_runtime.errors import CheckpointError

FOLDER_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
"""What diffusers and PEFT write into a folder."""


DENOISER, TEXT_ENCODER = "unet", "text_encoder"


_PREFIXES = {
    "base_model.model.": DENOISER,
    "unet.": DENOISER,
    "text_encoder.": TEXT_ENCODER,
    "lora_unet_": DENOISER,
    "lora_te_": TEXT_ENCODER,
    "lora_te1_": TEXT_ENCODER,
}


_TENSOR = re.compile(
    r"(?P<layer>.+?)[._](?:lora(?:_linear_layer)?[._](?P<side>A|B|down|up)(?:\.\w+)?\.weight|(?:lora\.)?(?P<alpha>alpha))",
    re.ASCII,
)
"""kohya writes `.lora_down.weight`, PEFT `.lora_A.weight` and `.lora_A.default.weight`, diffusers `.lora.down.weight`
and `_lora.down.weight`."""


@dataclass
class LoraLayer:
    """What a LoRA adds to one layer."""

    down: Tensor | None = None
    """A: [rank, in], of a convolution [rank, in, h, w]."""
    up: Tensor | None = None
    """B: [out, rank], of a convolution [out, rank, 1, 1]."""
    alpha: float | None = None


@dataclass(frozen=True)
class LoraFile:
    """A LoRA as it lies on disk, read and named as the model names its layers."""

    path: Path
    sha256: str
    layers: Mapping[str, Mapping[str, LoraLayer]] = field(repr=False)
    """Component -> layer -> what it adds; layers of kohya have underscores for dots."""


def read_lora(path: Path) -> LoraFile:
    """Read a file in the manner of diffusers, kohya or PEFT, or the folder of one.

    Raises:
        CheckpointError: it is missing, damaged, or holds what is no LoRA.
    """
    from safetensors import SafetensorError, safe_open

    file = next((path / name for name in FOLDER_FILES if (path / name).is_file()), path)
    if file.suffix != ".safetensors" or not file.is_file():
        raise CheckpointError(f"{path} is no LoRA; give a .safetensors file, or a folder with {FOLDER_FILES[0]}")
    try:
        with safe_open(file, framework="pt") as opened:
            state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # no mapping
            told = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
        beside = file.with_name("adapter_config.json")
        if file.name == FOLDER_FILES[1] and beside.is_file():
            told |= {f"{DENOISER}.{key}": value for key, value in json.loads(beside.read_bytes()).items()}
        sha256 = file_sha256(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); fetch it again from its source") from None
    layers = _sorted_out(file, state)
    for component, found in layers.items():
        prefix = f"{component}."
        _set_alphas(file, found, {k.removeprefix(prefix): v for k, v in told.items() if k.startswith(prefix)})
    return LoraFile(file, sha256, layers)


def _sorted_out(file: Path, state: Mapping[str, Tensor]) -> dict[str, dict[str, LoraLayer]]:
    """Every tensor in its place.

    Raises:
        CheckpointError: a tensor has none.
    """
    layers: dict[str, dict[str, LoraLayer]] = {}
    for name, tensor in state.items():
        prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None)
        found = _TENSOR.fullmatch(name.removeprefix(prefix or ""))
        if prefix is None or found is None:
            raise CheckpointError(
                f"{file} holds {name[:100]!r}; a LoRA of a denoiser and its text encoder is served, in the names of "
                "diffusers, kohya or PEFT, without DoRA, LoHa or LoKr: convert it"
            )
        layer = layers.setdefault(_PREFIXES[prefix], {}).setdefault(_layer_name(found["layer"]), LoraLayer())
        if found["alpha"]:
            layer.alpha = float(tensor)
        elif found["side"] in ("A", "down"):
            layer.down = tensor.float()
        else:
            layer.up = tensor.float()
    return layers


def _layer_name(name: str) -> str:
    """Without what older files say beside it: `attn1.processor.to_out` is `attn1.to_out.0`."""
    name = name.removeprefix("text_model.")
    if ".processor." in name:
        name = re.sub(r"\.to_out$", ".to_out.0", name.replace(".processor.", "."))
    return name


def _set_alphas(file: Path, layers: Mapping[str, LoraLayer], told: Mapping[str, Any]) -> None:
    """Fold alpha / rank into B, so that it need not be known any more.

    Args:
        told: PEFT's configuration of the component; where it is silent, alpha is the rank.

    Raises:
        CheckpointError: a layer is incomplete, or of a kind that is not served.
    """
    if told.get("use_dora"):
        raise CheckpointError(f"{file} is a DoRA, which is not served; merge it into its base")
    pattern = told.get("alpha_pattern") or {}
    for name, layer in layers.items():
        if layer.down is None or layer.up is None:
            raise CheckpointError(f"{file} has only one half of {name[:100]!r}; fetch it again from its source")
        rank = layer.down.shape[0]
        alpha = layer.alpha
        if alpha is None:
            alpha = float(next((v for k, v in pattern.items() if name.endswith(k)), told.get("lora_alpha", rank)))
        layer.up = layer.up * (alpha / (math.sqrt(rank) if told.get("use_rslora") else rank))
        layer.alpha = float(rank)
