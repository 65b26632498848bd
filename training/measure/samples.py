"""Pictures and clips of a prompt file: those of a folder, or those that a checkpoint makes."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from tdm_runtime.checkpoint.recipe import RECIPE_FILE
from tdm_runtime.checkpoint.stock.pipeline_folder import MODEL_INDEX
from tdm_runtime.media.made_file import FileFormat, encode_made
from tdm_runtime.media.receipt import receipt_of
from tdm_runtime.model.decoder import Pixels
from tdm_runtime.model.loaded_model import LoadedModel
from tdm_runtime.params import SamplingParams
from tdm_runtime.pipeline import generate
from tdm_runtime.whole_file import write_whole
from training.pretrained.latents import list_images


def is_checkpoint(folder: Path) -> bool:
    """Return whether a folder holds a checkpoint, rather than pictures or clips."""
    return any((folder / name).is_file() for name in (RECIPE_FILE, MODEL_INDEX))


def given_files(source: Path, prompts: Sequence[str], suffixes: Sequence[str]) -> list[Path]:
    """Return a file for each prompt.

    Args:
        source: A folder, whose files sorted by name pair with the prompts; or a prompt file with "image" on each line.

    Raises:
        ValueError: Files and prompts do not pair.
        PromptError: A line names no file.
    """
    if not source.exists():
        raise FileNotFoundError(f"{source} is missing; name a folder of pictures or clips, or a checkpoint")
    files = list_images(source, suffixes)
    if len(files) != len(prompts):
        raise ValueError(
            f"{source} has {len(files)} files ({', '.join(suffixes)}) for {len(prompts)} prompts; give one for each"
        )
    return files


def made_files(
    output: Path, name: str, model: LoadedModel, prompts: Sequence[str], steps: int | None, seed: int
) -> list[Path]:
    """Make a picture or clip of each prompt in OUTPUT/NAME, except those that are there; a killed run continues.

    They have the checkpoint's first size and default length, and the receipt of `tdm-generate`.

    Args:
        steps: Steps of each; None takes the default of the checkpoint.
        seed: Seed that each one's own is drawn from; see `sample_seed`.

    Raises:
        ValueError: The folder holds samples of other settings.
        InvalidRequestError: The checkpoint refuses a prompt or a setting.
    """
    recipe = model.recipe
    width, height = recipe.native_sizes[0]
    steps = recipe.default_steps if steps is None else steps
    frames = None if recipe.frames is None else recipe.frames.default
    keep_settings(
        output / f"{name}.json",
        {
            "num_inference_steps": steps, "width": width, "height": height, "frames": frames, "seed": seed,
            "digest": model.digest, "prompts": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
        },
    )  # fmt: skip
    file_format: FileFormat = "png" if frames is None else "mp4"
    wanted, times = {}, Counter[str]()
    for number, prompt in enumerate(prompts):
        own_seed = sample_seed(seed, prompt, times[prompt])
        times[prompt] += 1  # a prompt that comes twice has two seeds
        params = SamplingParams(prompt, own_seed, steps, width, height, frames=frames, fps=recipe.fps)
        wanted[f"{number:05d}.{file_format}"] = params
    make_missing(output / name, model, wanted, file_format)
    return [output / name / file for file in wanted]


def make_missing(
    folder: Path, model: LoadedModel, wanted: Mapping[str, SamplingParams], file_format: FileFormat
) -> int:
    """Make the pictures or clips that a folder lacks, by file name. Return how many were made.

    Raises:
        InvalidRequestError: The checkpoint refuses one of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = {name: params for name, params in wanted.items() if not (folder / name).is_file()}
    for params in list(missing.values())[:1]:
        params.check_against(model.recipe)
    for name, params in tqdm(missing.items(), folder.name, disable=None):
        pixels = generate(model, params)
        receipt = receipt_of(model, params, pixels, is_strict=True)
        partial = folder.parent / "sample.part"  # a long name leaves no room for such a mark
        partial.write_bytes(encode_made(model, params, pixels, file_format, receipt=receipt))
        partial.replace(folder / name)
    return len(missing)


def sample_seed(seed: int, prompt: str, index: int) -> int:
    """Return the seed of a sample, 32 bits. It does not depend on the other samples of a run."""
    digest = hashlib.sha256(json.dumps([seed, prompt, index]).encode()).digest()
    return int.from_bytes(digest[:4], "little")


def keep_settings(file: Path, wanted: Mapping[str, Any]) -> None:
    """Write down the settings of a run, or check that an earlier run into the same folder had the same.

    Raises:
        ValueError: It had others.
    """
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(dict(wanted), indent=2).encode())
        return
    found = json.loads(file.read_bytes())
    for name, value in wanted.items():
        if found.get(name) != value:
            message = f"{file} says {name} = {found.get(name)!r} and this run has {value!r}"
            raise ValueError(f"{message}; scores of mixed samples mean nothing: name another output folder")


def read_picture(file: Path) -> Pixels:
    """Return the pixels of a picture file, uint8 [H, W, 3].

    Raises:
        ValueError: The file cannot be read as a picture.
    """
    try:
        with Image.open(file) as picture:
            return np.asarray(picture.convert("RGB"))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} cannot be read as a picture ({error}); replace it or remove its prompt") from None
