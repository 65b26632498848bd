"""LoRA files of diffusers, kohya, PEFT and LyCORIS, read into layers by diffusers' names.

The stock pipeline of the family converts key styles (`lora_state_dict`), so every style that it reads is read here.
Styles that some pipelines leave unconverted are read for every family: PEFT's files of a bare denoiser, and kohya's
files with diffusers' names, whose dots became underscores.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tdm_runtime.checkpoint.file_hashes import file_sha256
from tdm_runtime.checkpoint.lora.lycoris import as_low_rank
from tdm_runtime.errors import CheckpointError
from tdm_runtime.families.family import Family

FOLDER_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
"""File names that diffusers and PEFT write into a folder."""
STEP_CONDITION_FILE = "step_condition.safetensors"
"""File beside `FOLDER_FILES[0]` with the weights that read K, if the LoRA was trained with K."""

_STABILITY_UNET = SimpleNamespace(layers_per_block=2)
"""What diffusers reads of a UNet's config to count blocks as Stability does; the same in SD 1, SD 2 and SDXL."""
_DENOISER_PREFIXES = ("base_model.model.", "diffusion_model.", "lora_unet_", "lora_transformer_")
"""Prefixes of a denoiser's layers in files of PEFT, ComfyUI and kohya, if the stock pipeline did not convert them."""
_KOHYA_DOWN = ".lora_down.weight"
_TENSOR = re.compile(
    r"(?P<layer>.+?)\.(?:lora_(?P<side>A|B|down|up|magnitude_vector)(?:\.(?!weight|bias)\w+)?(?:\.(?P<kind>weight|bias))?"
    r"|(?:lora\.|lora_A\.weight\.)?(?P<alpha>alpha))",
    re.ASCII,
)
"""PEFT writes `.lora_A.weight` and `.lora_A.default.weight`, kohya `.lora_down.weight`. kohya's alphas end in
`.lora_A.weight.alpha` after diffusers' conversion."""


@dataclass(frozen=True)
class LoraLayer:
    """The update of one layer: its weight grows by scaling * up @ down (Hu et al. 2021, eq. 3)."""

    down: Tensor
    """A: [rank, in], of a convolution [rank, in, h, w]."""
    up: Tensor
    """B: [out, rank], of a convolution [out, rank, 1, 1]."""
    scaling: float
    """alpha / rank; alpha / sqrt(rank) with rsLoRA."""
    magnitude: Tensor | None = None
    """Norms of the rows of the changed weight, [out], which DoRA trains (Liu et al. 2024, eq. 5)."""
    bias: Tensor | None = None
    """Grows the layer's bias by scaling * bias, [out]."""
    flat_name: str | None = None
    """Name in a file of kohya, with underscores in place of dots. diffusers' conversion spells some layers wrong."""


@dataclass(frozen=True)
class LoraFile:
    """A LoRA read from disk."""

    path: Path
    sha256: str
    """Of the file, and of the files beside it that are read: weights that read K, PEFT's configuration."""
    layers: Mapping[str, Mapping[str, LoraLayer]] = field(repr=False)
    """Component (`unet`, `transformer`, `text_encoder`, `text_encoder_2`, ...) -> layer -> its update."""
    step_condition: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    """Weights for `Denoiser.load_step_condition`; empty for a LoRA that was trained without K."""


def read_lora(path: Path, family: Family) -> LoraFile:
    """Read a LoRA file, or the folder that diffusers, PEFT or our training wrote.

    Args:
        family: family of the base.

    Raises:
        CheckpointError: the file is missing or damaged, or it is no LoRA for this family.
    """
    file = next((path / name for name in FOLDER_FILES if (path / name).is_file()), path)
    if file.suffix != ".safetensors" or not file.is_file():
        raise CheckpointError(f"{path} is no LoRA; give a .safetensors file, or a folder with {FOLDER_FILES[0]}")
    state, settings = _read_tensors(file)
    read = [file]
    if (settings_file := file.with_name("adapter_config.json")).is_file() and file.name == FOLDER_FILES[1]:
        read.append(settings_file)
        settings = {f"{family.denoiser_folder}.{key}": value for key, value in _read_json(settings_file).items()}
    if not any("lora" in name or "hada_" in name or "lokr_" in name for name in state):
        first = f"its first tensor is {min(state)[:100]!r}" if state else "it has no tensors"
        raise CheckpointError(f"{file} holds no LoRA ({first}); give a LoRA")
    layers = _layers(file, family, as_low_rank(file, state), settings)
    condition = file.with_name(STEP_CONDITION_FILE)
    weights: Mapping[str, Tensor] = {}
    if file.name == FOLDER_FILES[0] and condition.is_file():
        read.append(condition)
        weights = _read_tensors(condition)[0]
    return LoraFile(file, _sha256_of(read), layers, weights)


def _sha256_of(files: Sequence[Path]) -> str:
    """Return the sha256 of a file, or of those of several."""
    digests = [file_sha256(file) for file in files]
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a file, and PEFT's configuration of each component as diffusers saves it."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # no mapping
            return state, _object(json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}")))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); fetch it again from its source") from None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return _object(json.loads(file.read_bytes()))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); fetch it again from its source") from None


def _object(raw: Any) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise ValueError(f"PEFT's configuration is {str(raw)[:50]!r}, not an object")
    return raw


def _layers(
    file: Path, family: Family, state: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> dict[str, dict[str, LoraLayer]]:
    """Sort tensors by component and layer.

    Raises:
        CheckpointError: a tensor belongs to no LoRA of this family, or a layer is incomplete.
    """
    weights = {name: tensor for name, tensor in state.items() if not name.endswith(".dora_scale")}
    found: dict[str, dict[str, dict[str, Tensor]]] = {}
    strangers = []
    for name, tensor in _in_diffusers_names(family, weights).items():
        component, rest = _component(family, name)
        match = _TENSOR.fullmatch(_in_peft_names(family, component, rest))
        if component is None or match is None:
            strangers.append(name)
            continue
        role = "alpha" if match["alpha"] else {"down": "A", "up": "B"}.get(match["side"], match["side"])
        if match["kind"] == "bias":
            role += ".bias"
        found.setdefault(component, {}).setdefault(match["layer"], {})[role] = tensor
    if strangers:
        raise CheckpointError(
            f"{file} holds {len(strangers)} tensors that are no LoRA of {family.name} ({strangers[0][:100]!r}, ...); "
            "use the base of the LoRA"
        )
    # diffusers drops kohya's DoRA scales and respells names, and passes A on: by A, a layer is found again in the file.
    origins = {id(t): name.removesuffix(_KOHYA_DOWN) for name, t in state.items() if name.endswith(_KOHYA_DOWN)}
    scales = {name for name in state if name.endswith(".dora_scale")}
    layers: dict[str, dict[str, LoraLayer]] = {}
    for component, named in found.items():
        for name, tensors in named.items():
            origin = origins.get(id(tensors.get("A")))
            if (scale := f"{origin}.dora_scale") in scales:
                tensors["dora_scale"] = state[scale]
                scales.remove(scale)
            layer = _layer(file, name, tensors, _of(settings, component))
            flat_name = None if origin is None else _component(family, origin)[1]
            layers.setdefault(component, {})[name] = replace(layer, flat_name=flat_name)
    if scales:
        raise CheckpointError(
            f"{file} is a DoRA with {len(scales)} scales ({min(scales)[:100]!r}, ...) that do not fit the layers of "
            f"{family.name} one by one; merge it into its base"
        )
    return layers


def _in_diffusers_names(family: Family, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Let the stock pipeline convert key styles. Names that it does not know stay as they are."""
    components = tuple(f"{component}." for component in (family.denoiser_folder, *family.text_encoders))
    if all(name.startswith(components) for name in state):
        return state  # without importing the pipeline, which takes seconds

    import diffusers

    pipeline = getattr(diffusers, family.pipelines[0])
    if not hasattr(pipeline, "lora_state_dict"):
        return state
    given = {re.sub("^lora_transformer_", "lora_unet_", name): tensor for name, tensor in state.items()}
    try:
        converted = pipeline.lora_state_dict(given.copy(), unet_config=_STABILITY_UNET, return_alphas=True)
    except Exception:  # converters raise many kinds at names that they do not know
        return given
    named, alphas = converted if isinstance(converted, tuple) else (converted, None)
    if _count_layers(named) < _count_layers(given):  # others drop what they do not know
        return given
    return {**named, **{name: torch.as_tensor(alpha) for name, alpha in (alphas or {}).items()}}


def _count_layers(state: Iterable[str]) -> int:
    return sum(1 for name in state if re.search(r"[._](lora_A|lora_down|down)\.", name))


def _component(family: Family, name: str) -> tuple[str | None, str]:
    """Return the component that a tensor changes and the rest of the name.

    A name of diffusers without a component is of the denoiser; None stands for names in no known style.
    """
    prefixes = {f"{component}.": component for component in (family.denoiser_folder, *family.text_encoders)}
    prefixes |= {f"lora_te{number}_": encoder for number, encoder in enumerate(family.text_encoders, start=1)}
    prefixes["lora_te_"] = family.text_encoders[0]
    prefixes |= {prefix: family.denoiser_folder for prefix in _DENOISER_PREFIXES}
    prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
    if prefix is None:
        return (None if name.startswith("lora_") else family.denoiser_folder), name
    return prefixes[prefix], name.removeprefix(prefix)


def _in_peft_names(family: Family, component: str | None, name: str) -> str:
    """Return PEFT's name of a tensor; older files write `attn1.processor.to_out_lora` for `attn1.to_out.0`."""
    if re.search(r"\.lora_(A|B|magnitude_vector)\b", name):
        return name  # diffusers' conversion would respell `to_out`, which FLUX.2 has beside `to_out.0`

    from diffusers.utils.state_dict_utils import (
        StateDictType,
        convert_state_dict_to_peft,
        convert_unet_state_dict_to_peft,
    )

    state = {name: None}
    if component != family.denoiser_folder:
        state = convert_state_dict_to_peft(state, StateDictType.DIFFUSERS_OLD)
    (converted,) = convert_unet_state_dict_to_peft(state)
    return str(converted)


def _of(settings: Mapping[str, Any], component: str) -> dict[str, Any]:
    """Return PEFT's configuration of one component."""
    prefix = f"{component}."
    return {key.removeprefix(prefix): value for key, value in settings.items() if key.startswith(prefix)}


def _layer(file: Path, name: str, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> LoraLayer:
    """Put the tensors of one layer together.

    Args:
        settings: PEFT's configuration of the component. Without an alpha, alpha is the rank.

    Raises:
        CheckpointError: the layer is incomplete, or of a kind that is not read.
    """
    if unknown := set(tensors) - {"A", "B", "B.bias", "alpha", "magnitude_vector", "dora_scale"}:
        raise CheckpointError(f"{file} has a {min(unknown)} of {name[:100]!r}, which LoRAs do not have; convert it")
    if "A" not in tensors or "B" not in tensors:
        raise CheckpointError(f"{file} has only one half of {name[:100]!r}; fetch it again from its source")
    for role, tensor in tensors.items():
        if role != "alpha" and not tensor.is_floating_point():
            raise CheckpointError(f"{file} has {role} of {name[:100]!r} in {tensor.dtype}; convert it to float16")
        if not tensor.float().isfinite().all():
            raise CheckpointError(
                f"{file} has NaN or infinity in {role} of {name[:100]!r}; fetch it from its source again"
            )
    down, up = tensors["A"], tensors["B"]
    if down.ndim < 2 or up.ndim < 2 or not len(down) == up.shape[1] > 0:
        raise CheckpointError(
            f"{file} has A of shape {tuple(down.shape)} and B of shape {tuple(up.shape)} for {name[:100]!r}; the first "
            "number of A and the second of B are the rank and must be equal: fetch it again from its source"
        )
    magnitude = tensors.get("magnitude_vector", tensors.get("dora_scale"))
    if "dora_scale" in tensors and tensors["dora_scale"].shape[0] != len(up):
        raise CheckpointError(
            f"{file} is a DoRA with a scale for each input of {name[:100]!r}, and only scales of outputs are read; "
            "merge it into its base"
        )
    rank = len(down)
    try:
        alpha = tensors["alpha"].item() if "alpha" in tensors else _alpha(name, rank, settings)
    except (ValueError, RuntimeError, TypeError, AttributeError, re.error) as error:
        raise CheckpointError(
            f"{file} has no number as alpha of {name[:100]!r} ({error}); fetch it again from its source"
        ) from None
    scaling = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    return LoraLayer(down, up, scaling, None if magnitude is None else magnitude.flatten(), tensors.get("B.bias"))


def _alpha(name: str, rank: int, settings: Mapping[str, Any]) -> float:
    """Return the alpha of a layer by PEFT's configuration, whose patterns are regular expressions."""
    patterns: Iterable[tuple[str, float]] = (settings.get("alpha_pattern") or {}).items()
    matching = (alpha for pattern, alpha in patterns if re.match(rf"(.*\.)?({pattern})$", name))
    return float(next(matching, settings.get("lora_alpha", rank)))
