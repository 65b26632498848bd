"""`Order`: what one Triton request asks for, read from its input tensors."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from tdm_runtime import InvalidRequestError, SamplingParams
from tdm_runtime.checkpoint.recipe import Recipe
from tdm_runtime.errors import shown
from tdm_runtime.media.image_file import ImageFormat
from tdm_runtime.params import MAX_SEED, parse_size

OutputFormat = Literal["raw"] | ImageFormat
FORMATS: tuple[str, ...] = ("raw", *get_args(ImageFormat))


@dataclass(frozen=True)
class Order:
    """One picture and how it is delivered."""

    params: SamplingParams
    latency_budget_ms: float | None
    """See `Delivery`."""
    min_inference_steps: int | None
    """See `Delivery`; not None where `num_inference_steps` is 0."""
    strict: bool
    """See `Delivery`."""
    num_previews: int
    """Number of steps to send a preview of."""
    output_format: OutputFormat


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
    texts = {name: _text(name, tensor[0]) for name, tensor in inputs.items() if tensor.dtype == np.object_}
    numbers = {name: tensor[0].item() for name, tensor in inputs.items() if tensor.dtype != np.object_}
    if texts.get("negative_prompt"):
        message = f"negative_prompt needs guidance, which {recipe.name} has distilled in; leave it out"
        raise InvalidRequestError(message, param="negative_prompt")
    output_format = texts.get("output_format", "raw")
    if output_format not in FORMATS:
        message = f"output_format is {shown(output_format)}; it must be {', '.join(FORMATS)}"
        raise InvalidRequestError(message, param="output_format")
    steps = numbers.get("num_inference_steps", 0)
    size = texts.get("size", "auto")
    width, height = recipe.native_sizes[0] if size in ("", "auto") else parse_size(size)
    params = SamplingParams(
        prompt=texts["prompt"],
        seed=numbers.get("seed", secrets.randbelow(MAX_SEED + 1)),
        num_inference_steps=steps or recipe.step_counts[-1],
        width=width,
        height=height,
        guidance_scale=numbers.get("guidance_scale"),
    )
    params.check_against(recipe)
    return Order(
        params,
        latency_budget_ms=numbers.get("latency_budget_ms"),
        min_inference_steps=None if steps else recipe.step_counts[0],
        strict=bool(numbers.get("strict")),
        num_previews=params.num_inference_steps - 1 if numbers.get("previews") else 0,
        output_format=output_format,  # type: ignore[arg-type]
    )


def _text(name: str, value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"{name} is not UTF-8 at byte {error.start}; send valid UTF-8", param=name) from None
