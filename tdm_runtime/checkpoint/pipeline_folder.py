"""Folders of stock diffusers pipelines: their family, their JSON files and their text encoders."""

from __future__ import annotations

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tdm_runtime.errors import CheckpointError
from tdm_runtime.families import FAMILIES, Family, family_of_pipeline
from tdm_runtime.families.family import TextEncoders

MODEL_INDEX = "model_index.json"
MAX_JSON_BYTES = 64 * 1024 * 1024
"""Largest JSON file that is read; an index of shards has about 1 MB."""


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: the file is missing, cannot be read or holds something else.
    """
    try:
        if file.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"it has {file.stat().st_size} bytes, at most {MAX_JSON_BYTES} are read")
        raw = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file.parent} lacks {file.name}; restore the folder from its source") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); restore the folder from its source") from None
    if not isinstance(raw, dict):
        problem = f"it holds a {type(raw).__name__}, not an object"
        raise CheckpointError(f"{file} cannot be read ({problem}); restore the folder from its source")
    return raw


def family_of(folder: Path) -> Family:
    """Return the family of a diffusers pipeline folder.

    Raises:
        CheckpointError: the folder is missing, damaged or of an unknown pipeline.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give a diffusers pipeline folder, which has {MODEL_INDEX}")
    file = folder / MODEL_INDEX
    index = read_json(file)
    name = index.get("_class_name")
    if not isinstance(name, str):
        raise CheckpointError(f"{file} cannot be read (it names no _class_name); restore the folder from its source")
    family = family_of_pipeline(name)
    if family is None:
        known = ", ".join(name for family in FAMILIES.values() for name in family.pipelines)
        raise CheckpointError(f"{folder} holds a {name}; this version knows {known}: use a folder of those")
    part, names = family.denoiser_folder, (family.denoiser_class, family.former_denoiser_class)
    if index.get(part) not in [["diffusers", name] for name in names]:
        raise CheckpointError(
            f"{file} says that {part} is {index.get(part)}; a {name} has a {family.denoiser_class}: "
            "restore the folder from its source"
        )
    return family


def text_parts(index: dict[str, Any], family: Family) -> tuple[str, ...]:
    """Return the folders of tokenizers and text encoders that a pipeline has.

    Args:
        index: content of model_index.json.

    Raises:
        CheckpointError: one that the family cannot do without is missing.
    """
    wanted = (*family.tokenizers, *family.text_encoders)
    there = tuple(name for name in wanted if isinstance(index.get(name), list) and index[name][-1] is not None)
    if missing := sorted({*wanted} - {*there} - {*family.optional_text}):
        raise CheckpointError(f"it comes without {', '.join(missing)}; prompts need all text encoders: add them")
    return there


def load_text_encoders(
    folder: Path, family: Family, width: int, height: int, device: torch.device | str = "cpu"
) -> TextEncoders:
    """Load the pipeline of a folder with nothing but its tokenizers and text encoders, float32.

    Args:
        width, height: size of the pictures in pixels, which SDXL reads.

    Raises:
        CheckpointError: a part is missing or cannot be loaded.
    """
    import diffusers

    _quieten()
    index = read_json(folder / MODEL_INDEX)
    try:
        there = text_parts(index, family)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    others = {name: None for name, value in index.items() if isinstance(value, list) and name not in there}
    load = partial(getattr(diffusers, index["_class_name"]).from_pretrained, **family.pipeline_options, **others)
    try:
        pipeline = load(folder, dtype=torch.float32, use_safetensors=True, local_files_only=True)
    except Exception as error:  # the libraries raise many kinds; a user can do the same about all of them
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"the text encoders of {folder} cannot be loaded: {reason}; restore the folder from its source"
        ) from error
    config = read_json(folder / family.denoiser_folder / "config.json")
    return TextEncoders(pipeline.to(device), config, width, height)


def _quieten() -> None:
    """Turn off what stock pipelines would log: prompts that they cut, lengths of prompts, progress of loading."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    of_diffusers.disable_progress_bar()
    of_transformers.disable_progress_bar()
    for name in ("diffusers.pipelines", "transformers.tokenization_utils_base"):
        logging.getLogger(name).setLevel(logging.ERROR)
