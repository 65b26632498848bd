"""`SamplingParams`: the parameters of one picture. All their values are checked here."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal, get_args

from tdm_runtime.checkpoint.recipe import MAX_GUIDANCE_SCALE, Recipe
from tdm_runtime.errors import InvalidRequestError, shown

DecoderName = Literal["full", "tiny"]
MAX_PROMPT_CHARACTERS = 2000
UNREADABLE = re.compile(r"[\x00\ud800-\udfff]")
"""NUL and halves of surrogate pairs."""
MAX_SEED = 2**32 - 1
"""torch's CPU generator reads 32 bits of a seed: a larger one would repeat a smaller one's picture."""


@dataclass(frozen=True)
class SamplingParams:
    """Parameters that determine one picture: the same values give the same picture.

    Raises:
        InvalidRequestError: naming the value, the limit and the remedy.
    """

    prompt: str
    seed: int
    """0..2^32 - 1."""
    num_inference_steps: int
    width: int
    """Pixels."""
    height: int
    """Pixels."""
    decoder: DecoderName = "full"
    """Decoder of the latents; "tiny" is cheaper and a little softer."""
    noise_angle: float = 0.0
    """Angle on the seed's circle of noises (`sampling.noise.SeedNoise`), in radians, 0 <= angle < 2 pi. Pictures at
    evenly spaced angles make a clip that ends where it began."""
    guidance_scale: float | None = None
    """Guidance scale for a model that reads it as an input, 0..100; None takes the recipe's. Other models have guidance
    distilled into their weights."""

    def __post_init__(self) -> None:
        _check_prompt(self.prompt)
        if type(self.seed) is not int or not 0 <= self.seed <= MAX_SEED:
            raise InvalidRequestError(
                f"seed is {shown(self.seed)}; it must be a whole number from 0 to {MAX_SEED}", param="seed"
            )
        if self.decoder not in get_args(DecoderName):
            raise InvalidRequestError(
                f"decoder is {shown(self.decoder)}; it must be {' or '.join(get_args(DecoderName))}", param="decoder"
            )
        if type(self.noise_angle) is not float or not 0.0 <= self.noise_angle < math.tau:
            raise InvalidRequestError(
                f"noise_angle is {shown(self.noise_angle)}; it must be a float, from 0.0 to below 2 pi radians",
                param="noise_angle",
            )
        if self.guidance_scale is not None and not 0.0 <= self.guidance_scale <= MAX_GUIDANCE_SCALE:
            raise InvalidRequestError(
                f"guidance_scale is {shown(self.guidance_scale)}; it must be from 0 to {MAX_GUIDANCE_SCALE:g}",
                param="guidance_scale",
            )

    def check_against(self, recipe: Recipe) -> None:
        """Check the values that depend on the checkpoint.

        Raises:
            InvalidRequestError: a step count or size that the checkpoint was not trained for.
        """
        steps = self.num_inference_steps
        if type(steps) is not int or steps not in recipe.timesteps:
            counts = ", ".join(map(str, recipe.step_counts))
            raise InvalidRequestError(
                f"num_inference_steps is {shown(steps)}; {recipe.name} serves {counts}", param="num_inference_steps"
            )
        self._check_size(recipe)
        if self.guidance_scale is not None and recipe.guidance_scale is None:
            raise InvalidRequestError(
                f"guidance_scale is {shown(self.guidance_scale)}; {recipe.name} has guidance distilled in "
                "and reads no scale; leave it out",
                param="guidance_scale",
            )

    def _check_size(self, recipe: Recipe) -> None:
        size, rule = (self.width, self.height), recipe.size_rule
        are_whole = all(type(side) is int and side > 0 for side in size)
        if are_whole and (size in recipe.native_sizes or (rule is not None and rule.allows(*size))):
            return
        makes = ", ".join(f"{width}x{height}" for width, height in recipe.native_sizes)
        if rule is not None:
            makes += f" and {rule}"
        if rule is not None and are_whole:
            width, height = rule.nearest(*size)
            makes += f": take {width}x{height}"
        raise InvalidRequestError(
            f"size is {shown(self.width)}x{shown(self.height)}; {recipe.name} makes {makes}", param="size"
        )


def _check_prompt(prompt: object) -> None:
    if not isinstance(prompt, str):
        raise InvalidRequestError(f"prompt is {shown(prompt)}; it must be a string", param="prompt")
    if len(prompt) > MAX_PROMPT_CHARACTERS:
        raise InvalidRequestError(
            f"prompt has {len(prompt)} characters; at most {MAX_PROMPT_CHARACTERS} are read, shorten it", param="prompt"
        )
    if UNREADABLE.search(prompt):
        raise InvalidRequestError(
            "prompt holds a NUL or half a surrogate pair; send valid Unicode text", param="prompt"
        )
    if not prompt.strip():
        raise InvalidRequestError("prompt is empty; say what the picture should show", param="prompt")
