"""`Order`: what one Triton request asks for, read from its input tensors."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tdm_runtime import InvalidRequestError, SamplingParams
from tdm_runtime.checkpoint.recipe import Recipe
from tdm_runtime.edit import Edit, GivenPicture
from tdm_runtime.errors import shown
from tdm_runtime.media.given_picture import read_mask, read_picture, to_edit, to_references
from tdm_runtime.media.image_file import ImageFormat
from tdm_runtime.media.made_file import FileFormat
from tdm_runtime.params import MAX_SEED, PromptSyntax, parse_size

PICTURES: tuple[FileFormat, ...] = get_args(ImageFormat)
CLIPS: tuple[FileFormat, ...] = ("mp4", "webm", "webp", "gif")
FILES = ("image", "mask")
"""Inputs that are files."""
RAW = "raw"
"""Output format of bare pixels."""


@dataclass(frozen=True)
class Order:
    """One picture or clip and how it is delivered."""

    params: SamplingParams
    latency_budget_ms: float | None
    """See `Delivery`."""
    min_inference_steps: int | None
    """See `Delivery`; not None where `num_inference_steps` is 0."""
    strict: bool
    """See `Delivery`."""
    num_previews: int
    """Number of steps to send a preview of."""
    file_format: FileFormat | None
    """None for bare pixels."""


def read_order(inputs: Mapping[str, NDArray[np.generic] | NDArray[np.object_]], recipe: Recipe) -> Order:
    """Read the input tensors of a request.

    Args:
        inputs: name -> tensor of shape [1], only those that were sent.
        recipe: recipe of the model.

    Raises:
        InvalidRequestError: naming the input, its value and its limits.
    """
    for name, tensor in inputs.items():
        if tensor.shape != (1,):
            raise InvalidRequestError(f"{name} has the shape {list(tensor.shape)}; it must be [1]", param=name)
    elements = {name: tensor[0] for name, tensor in inputs.items() if tensor.dtype == np.object_}
    files = {name: elements.pop(name) for name in FILES if elements.get(name)}
    texts = {name: _text(name, value) for name, value in elements.items()}
    numbers = {name: tensor[0].item() for name, tensor in inputs.items() if tensor.dtype != np.object_}
    if texts.get("negative_prompt"):
        message = f"negative_prompt needs guidance, which {recipe.name} has distilled in; leave it out"
        raise InvalidRequestError(message, param="negative_prompt")
    steps = numbers.get("num_inference_steps", 0)
    picture = read_picture(files["image"]) if "image" in files else None
    starts_from_one = "mask" in files or "strength" in numbers
    references = to_references([] if picture is None else [picture], recipe, starts_from_one)
    width, height = _size(texts.get("size") or "auto", recipe, references[0] if references else picture)
    params = SamplingParams(
        prompt=texts["prompt"],
        seed=numbers.get("seed", secrets.randbelow(MAX_SEED + 1)),
        num_inference_steps=steps or recipe.step_counts[-1],
        width=width,
        height=height,
        guidance_scale=numbers.get("guidance_scale"),
        frames=_frames(numbers.get("num_frames"), recipe),
        fps=numbers.get("fps") or None,
        edit=None if references else _edit(picture, files.get("mask"), numbers.get("strength"), width, height),
        references=references,
        prompt_syntax=cast(PromptSyntax, texts.get("prompt_syntax") or SamplingParams.prompt_syntax),
    )
    params.check_against(recipe)
    return Order(
        params,
        latency_budget_ms=numbers.get("latency_budget_ms"),
        min_inference_steps=None if steps else recipe.step_counts[0],
        strict=bool(numbers.get("strict")),
        num_previews=params.num_steps - 1 if numbers.get("previews") else 0,
        file_format=_file_format(texts.get("output_format", RAW), recipe),
    )


def _size(text: str, recipe: Recipe, picture: Image.Image | GivenPicture | None) -> tuple[int, int]:
    """Return width and height in pixels; "auto" is the size nearest to the given picture's."""
    if text != "auto":
        return parse_size(text)
    return recipe.native_sizes[0] if picture is None else recipe.nearest_size(*picture.size)


def _edit(
    picture: Image.Image | None, mask_file: bytes | None, strength: float | None, width: int, height: int
) -> Edit | None:
    """Return the edit of a given picture in a size, in pixels; None without one."""
    if picture is None:
        if mask_file or strength is not None:
            raise InvalidRequestError("mask and strength are about image, which is missing; send it", param="image")
        return None
    mask = None if mask_file is None else read_mask(mask_file)
    return to_edit(picture, strength, width, height, mask)


def _file_format(text: str, recipe: Recipe) -> FileFormat | None:
    made, formats = ("pictures", PICTURES) if recipe.frames is None else ("clips", CLIPS)
    if text == RAW:
        return None
    for file_format in formats:
        if text == file_format:
            return file_format
    message = f"output_format is {shown(text)}; {recipe.name} makes {made}: {', '.join((RAW, *formats))}"
    raise InvalidRequestError(message, param="output_format")


def _frames(num_frames: int | None, recipe: Recipe) -> int | None:
    """Return the frames of a clip, None for a picture. 0 takes the recipe's default, as with the steps."""
    rule = recipe.frames
    if rule is None and num_frames:
        message = f"num_frames is {num_frames}; {recipe.name} makes pictures, not clips: leave it out"
        raise InvalidRequestError(message, param="num_frames")
    if rule is None or not num_frames:
        return recipe.default_frames
    if not rule.allows(num_frames):
        message = f"num_frames is {num_frames}; {recipe.name} makes {rule}: take {rule.nearest(num_frames)}"
        raise InvalidRequestError(message, param="num_frames")
    return num_frames


def _text(name: str, value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"{name} is not UTF-8 at byte {error.start}; send valid UTF-8", param=name) from None
