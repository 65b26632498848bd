"""Folders of stock diffusers pipelines: their family, their JSON files and their text encoders."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tdm_runtime.checkpoint.weight_shapes import check_shapes
from tdm_runtime.errors import CheckpointError
from tdm_runtime.families import FAMILIES, Family, family_of_pipeline
from tdm_runtime.families.family import TextEncoders

MODEL_INDEX = "model_index.json"
MAX_JSON_BYTES = 64 * 1024 * 1024
"""Largest JSON file that is read; an index of shards has about 1 MB."""
UNREAD_WEIGHTS = ("position_ids", "lm_head.weight")
"""Tensors, by the end of their name, that published files may hold and no text encoder reads."""


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
    part = family.denoiser_folder
    names = (family.denoiser_class, family.former_denoiser_class, *family.other_denoiser_classes)
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


def quiet_libraries() -> None:
    """Keep progress bars and warnings of diffusers and transformers off stderr. What they report as errors we raise."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    for logging in (of_diffusers, of_transformers):
        logging.disable_progress_bar()
        logging.set_verbosity_error()


def unloadable(folder: Path, error: Exception) -> CheckpointError:
    """Return the error of a part that a library could not load, in one line."""
    lines = str(error).strip().splitlines()
    reason = lines[0] if lines else type(error).__name__
    return CheckpointError(f"{folder} cannot be loaded: {reason}; restore the folder from its source")


def load_model_part(folder: Path, model_class: Any, dtype: torch.dtype) -> Any:
    """Load a model with all its weights.

    Args:
        folder: of the part.
        model_class: of diffusers or transformers.

    Raises:
        CheckpointError: it cannot be loaded, or weights are missing or unused.
    """
    quiet_libraries()
    options = {"dtype": dtype, "use_safetensors": True, "local_files_only": True}
    try:
        model, report = model_class.from_pretrained(folder, output_loading_info=True, **options)
    except Exception as error:  # the libraries raise many kinds; a user can do the same about all of them
        with suppress(OSError, ValueError, TypeError, KeyError):  # a config that describes no model
            check_shapes(folder, model_class)
        raise unloadable(folder, error) from error
    check_loaded(folder, report)
    return model


def check_loaded(folder: Path, report: Mapping[str, Collection[str]]) -> None:
    """Check that no weight is missing or unused: the libraries would fill gaps with random numbers.

    Args:
        folder: of the component.
        report: of `from_pretrained(..., output_loading_info=True)`.

    Raises:
        CheckpointError: the config describes other weights.
    """
    unused = (name for name in report["unexpected_keys"] if not name.endswith(UNREAD_WEIGHTS))
    if strangers := sorted({*report["missing_keys"], *unused}):
        raise CheckpointError(
            f"{folder / 'config.json'} does not describe the weights beside it: {len(strangers)} tensors are missing "
            f"or left over ({strangers[0]}, ...); restore the folder from its source"
        )


def load_text_encoders(
    folder: Path,
    family: Family,
    width: int,
    height: int,
    device: torch.device | str = "cpu",
    load_part: Callable[[str, Any], Any] | None = None,
) -> TextEncoders:
    """Load the pipeline of a folder with nothing but its tokenizers and text encoders.

    Args:
        width, height: size of the pictures in pixels, which SDXL reads.
        load_part: Returns the text encoder of a folder, such as text_encoder_2, and a class of transformers. None loads
            float32.

    Raises:
        CheckpointError: a part is missing or cannot be loaded.
    """
    import diffusers
    import transformers

    quiet_libraries()
    index = read_json(folder / MODEL_INDEX)
    try:
        there = text_parts(index, family)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    named = (*family.optional_text, *(name for name, value in index.items() if isinstance(value, list)))
    others = {name: None for name in named if name not in there}
    load_part = load_part or (lambda part, model_class: load_model_part(folder / part, model_class, torch.float32))
    models = {
        part: load_part(part, getattr(transformers, str(index[part][-1]), None)).eval()
        for part in family.text_encoders
        if part in there
    }
    load = partial(getattr(diffusers, index["_class_name"]).from_pretrained, **family.pipeline_options)
    try:
        pipeline = load(folder, local_files_only=True, **models, **others)
    except Exception as error:  # the libraries raise many kinds; a user can do the same about all of them
        raise unloadable(folder, error) from error
    config = read_json(folder / family.denoiser_folder / "config.json")
    return TextEncoders(pipeline.to(device), config, width, height)
