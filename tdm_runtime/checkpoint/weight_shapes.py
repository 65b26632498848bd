"""Shapes of the tensors of weight files, by their headers, beside those that the config of a model describes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tdm_runtime.errors import CheckpointError

FORMER_LEVELS = ("text_model.", "model.")
"""Levels in front of the names of a file that a model class may lack."""
_DEFAULT_WEIGHTS = re.compile(r"(diffusion_pytorch_model|model)(-\d+-of-\d+)?\.safetensors")
"""Names of files that are read unless a variant is asked for."""


def tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of a weight file, by its header.

    Raises:
        CheckpointError: the file is no safetensors, is cut short or cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "np") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged ({error}); restore the file from the checkpoint's source") from None


def described_model(folder: Path, model_class: Any) -> nn.Module:
    """Return the model that a config describes, on the meta device: with shapes and without numbers.

    Args:
        folder: of a part, with its config.json.
        model_class: of diffusers or transformers.
    """
    with torch.device("meta"):
        if hasattr(model_class, "load_config"):
            model: nn.Module = model_class.from_config(model_class.load_config(folder))
        else:
            model = model_class(model_class.config_class.from_pretrained(folder))
    return model


def check_shapes(folder: Path, model_class: Any) -> None:
    """Check the shapes of weights against the model that their config describes, without reading a weight.

    Names that libraries convert when they load are not compared.

    Args:
        folder, model_class: see `described_model`.

    Raises:
        CheckpointError: naming file, tensor, both shapes and the remedy.
    """
    tensors = described_model(folder, model_class).state_dict()
    described = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    described |= {level + name: shape for level in FORMER_LEVELS for name, shape in described.items()}
    for file in sorted(file for file in folder.iterdir() if _DEFAULT_WEIGHTS.fullmatch(file.name)):
        for name, shape in tensor_shapes(file).items():
            if shape != described.get(name, shape):
                raise CheckpointError(
                    f"{file} holds {name} of shape {shape}, and {folder / 'config.json'} describes "
                    f"{described[name]}; restore the folder from its source"
                )
