"""LoRA files of diffusers, kohya and PEFT."""

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
"""File names that diffusers and PEFT write into a folder."""


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
    """The low-rank update of one layer."""

    down: Tensor | None = None
    """A: [rank, in], of a convolution [rank, in, h, w]."""
    up: Tensor | None = None
    """B: [out, rank], of a convolution [out, rank, 1, 1]."""
    alpha: float | None = None


@dataclass(frozen=True)
class LoraFile:
    """A LoRA read from disk, with layers named as the model names them."""

    path: Path
    sha256: str
    layers: Mapping[str, Mapping[str, LoraLayer]] = field(repr=False)
    """Component -> layer -> its update. kohya writes layer names with underscores in place of dots."""


def read_lora(path: Path) -> LoraFile:
    """Read a LoRA file of diffusers, kohya or PEFT, or the folder that holds it.

    Raises:
        CheckpointError: the file is missing, damaged, or not a LoRA.
    """
    from safetensors import SafetensorError, safe_open

    file = next((path / name for name in FOLDER_FILES if (path / name).is_file()), path)
    if file.suffix != ".safetensors" or not file.is_file():
        raise CheckpointError(f"{path} is no LoRA; give a .safetensors file, or a folder with {FOLDER_FILES[0]}")
    try:
        with safe_open(file, framework="pt") as opened:
            state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # no mapping
            settings = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
        beside = file.with_name("adapter_config.json")
        if file.name == FOLDER_FILES[1] and beside.is_file():
            settings |= {f"{DENOISER}.{key}": value for key, value in json.loads(beside.read_bytes()).items()}
        sha256 = file_sha256(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); fetch it again from its source") from None
    layers = _sorted_out(file, state)
    for component, found in layers.items():
        prefix = f"{component}."
        _set_alphas(file, found, {k.removeprefix(prefix): v for k, v in settings.items() if k.startswith(prefix)})
    return LoraFile(file, sha256, layers)


def _sorted_out(file: Path, state: Mapping[str, Tensor]) -> dict[str, dict[str, LoraLayer]]:
    """Sort tensors by component and layer.

    Raises:
        CheckpointError: the name of a tensor is unknown.
    """
    layers: dict[str, dict[str, LoraLayer]] = {}
    for name, tensor in state.items():
        prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None)
        found = _TENSOR.fullmatch(name.removeprefix(prefix or ""))
        if prefix is None or found is None:
            raise CheckpointError(
                f"{file} holds {name[:100]!r}; LoRAs of a denoiser and its text encoder are served, with keys of "
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
    """Return the current name of a layer: older files write `attn1.processor.to_out` for `attn1.to_out.0`."""
    name = name.removeprefix("text_model.")
    if ".processor." in name:
        name = re.sub(r"\.to_out$", ".to_out.0", name.replace(".processor.", "."))
    return name


def _set_alphas(file: Path, layers: Mapping[str, LoraLayer], settings: Mapping[str, Any]) -> None:
    """Multiply B by alpha / rank, so that later code needs neither.

    Args:
        settings: PEFT's configuration of the component. Without an alpha, alpha is the rank.

    Raises:
        CheckpointError: a layer is incomplete, or of a kind that is not served.
    """
    if settings.get("use_dora"):
        raise CheckpointError(f"{file} is a DoRA, which is not served; merge it into its base")
    pattern = settings.get("alpha_pattern") or {}
    for name, layer in layers.items():
        if layer.down is None or layer.up is None:
            raise CheckpointError(f"{file} has only one half of {name[:100]!r}; fetch it again from its source")
        rank = layer.down.shape[0]
        alpha = layer.alpha
        if alpha is None:
            alpha = float(next((v for k, v in pattern.items() if name.endswith(k)), settings.get("lora_alpha", rank)))
        layer.up = layer.up * (alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank))
        layer.alpha = float(rank)
