"""`SamplingParams`: the parameters of one picture or clip. All their values are checked here."""

from __future__ import annotations

import math
import re
import unicodedata
from dataclasses import dataclass
from typing import Literal, get_args

from tdm_runtime.checkpoint.frame_rule import MAX_FRAMES
from tdm_runtime.checkpoint.recipe import MAX_FPS, MAX_GUIDANCE_SCALE, Recipe
from tdm_runtime.edit import Edit, GivenPicture, digest_of
from tdm_runtime.errors import InvalidRequestError, shown

DecoderName = Literal["full", "tiny"]
PromptSyntax = Literal["plain", "a1111"]
MAX_PROMPT_CHARACTERS = 2000
MAX_LORA_SCALE = 4.0
"""Largest scale of a LoRA, either way; as far as LoRAs that are sliders go."""
UNREADABLE = re.compile(r"[\x00\ud800-\udfff]")
"""NUL and halves of surrogate pairs."""
MAX_SEED = 2**32 - 1
"""torch's CPU generator reads 32 bits of a seed: a larger one would repeat a smaller one's picture."""


@dataclass(frozen=True)
class SamplingParams:
    """Parameters that determine one picture or clip: the same values give the same pixels.

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
    lora_scale: float | None = None
    """Scale of the LoRA, for a model that is a LoRA on a base; None takes the one that it is served with."""
    frames: int | None = None
    """Number of frames of a clip; None for a picture."""
    fps: int | None = None
    """Frames per second at which a clip is shown, 1..120; None takes the recipe's. It changes no pixel."""
    prompt_syntax: PromptSyntax = "plain"
    """"a1111" reads weights and BREAK in the prompt (`families.prompt_weights`), for CLIP; "plain" reads words."""
    edit: Edit | None = None
    """Picture to start from; None starts from noise alone."""
    references: tuple[GivenPicture, ...] = ()
    """Pictures that the denoiser reads beside the prompt, fitted by the model's `ReferenceRule`. With them, no edit."""

    @property
    def given_pictures(self) -> tuple[GivenPicture, ...]:
        """All pictures that are encoded before the first step."""
        return self.references if self.edit is None else (self.edit,)

    @property
    def edit_digest(self) -> str | None:
        """sha256 of the given pictures and a mask; None for a picture that starts from noise alone."""
        if self.edit is not None:
            return self.edit.digest
        return digest_of(self.references) if self.references else None

    @property
    def num_steps(self) -> int:
        """Steps that really run: an edit leaves out the first of `num_inference_steps`."""
        return self.num_inference_steps if self.edit is None else self.edit.num_steps(self.num_inference_steps)

    def __post_init__(self) -> None:
        _check_prompt(self.prompt)
        if type(self.seed) is not int or not 0 <= self.seed <= MAX_SEED:
            raise InvalidRequestError(
                f"seed is {shown(self.seed)}; it must be a whole number from 0 to {MAX_SEED}, or left out to draw one",
                param="seed",
            )
        if self.decoder not in get_args(DecoderName):
            raise InvalidRequestError(
                f"decoder is {shown(self.decoder)}; it must be {' or '.join(get_args(DecoderName))}", param="decoder"
            )
        if self.prompt_syntax not in get_args(PromptSyntax):
            raise InvalidRequestError(
                f"prompt_syntax is {shown(self.prompt_syntax)}; it must be {' or '.join(get_args(PromptSyntax))}",
                param="prompt_syntax",
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
        if self.lora_scale is not None and not abs(self.lora_scale) <= MAX_LORA_SCALE:
            raise InvalidRequestError(
                f"lora_scale is {shown(self.lora_scale)}; it must be from {-MAX_LORA_SCALE:g} to {MAX_LORA_SCALE:g}",
                param="lora_scale",
            )
        for name, value, limit in (("frames", self.frames, MAX_FRAMES), ("fps", self.fps, MAX_FPS)):
            if value is not None and not (type(value) is int and 1 <= value <= limit):
                raise InvalidRequestError(
                    f"{name} is {shown(value)}; it must be a whole number from 1 to {limit}", param=name
                )

    def check_against(self, recipe: Recipe) -> None:
        """Check the values that depend on the checkpoint.

        Raises:
            InvalidRequestError: a step count, size or number of frames that the checkpoint was not trained for.
        """
        steps = self.num_inference_steps
        if type(steps) is not int or steps not in recipe.timesteps:
            counts = ", ".join(map(str, recipe.step_counts))
            raise InvalidRequestError(
                f"num_inference_steps is {shown(steps)}; {recipe.name} serves {counts}", param="num_inference_steps"
            )
        self._check_size(recipe)
        self._check_frames(recipe)
        self._check_edit(recipe)
        if self.guidance_scale is not None and recipe.guidance_scale is None:
            raise InvalidRequestError(
                f"guidance_scale is {shown(self.guidance_scale)}; {recipe.name} has guidance distilled in "
                "and reads no scale; leave it out",
                param="guidance_scale",
            )
        if self.lora_scale is not None and recipe.lora_scale is None:
            name = recipe.name
            why = f"the LoRAs of {name} are merged into its weights" if recipe.adapters else f"{name} has no LoRA"
            raise InvalidRequestError(
                f"lora_scale is {shown(self.lora_scale)}; {why}: leave it out, or name a model that is a LoRA on a "
                "base (`tdm-serve --lora`)",
                param="lora_scale",
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

    def _check_frames(self, recipe: Recipe) -> None:
        rule = recipe.frames
        if rule is None:
            for name in ("frames", "fps"):
                if (value := getattr(self, name)) is not None:
                    raise InvalidRequestError(
                        f"{name} is {value}; {recipe.name} makes pictures, not clips: leave it out", param=name
                    )
        elif self.frames is None:
            raise InvalidRequestError(
                f"frames is missing; {recipe.name} makes clips of {rule}, not pictures: take {rule.default}",
                param="frames",
            )
        elif not rule.allows(self.frames):
            raise InvalidRequestError(
                f"frames is {self.frames}; {recipe.name} makes clips of {rule}: take {rule.nearest(self.frames)}",
                param="frames",
            )

    def _check_edit(self, recipe: Recipe) -> None:
        if self.references and self.edit is not None:
            raise InvalidRequestError("edit and references are both given; a picture has one of them", param="image")
        if self.references and recipe.references is None:
            raise InvalidRequestError(f"{recipe.name} reads no reference pictures; leave them out", param="image")
        if recipe.references is not None:
            recipe.references.check(self.references)
        if self.edit is None:
            return
        if recipe.frames is not None:
            raise InvalidRequestError(f"{recipe.name} makes clips and edits no picture; leave image out", param="image")
        if self.noise_angle:
            raise InvalidRequestError(
                f"noise_angle is {self.noise_angle}; an edit starts from the noise at angle 0", param="noise_angle"
            )
        width, height = self.edit.size
        if (width, height) != (self.width, self.height):
            raise InvalidRequestError(
                f"the given picture is {width}x{height}; scale it to the size to make, {self.width}x{self.height}",
                param="image",
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
    if all(character.isspace() or unicodedata.category(character) == "Cf" for character in prompt):
        raise InvalidRequestError("prompt is empty; say what the picture should show", param="prompt")


def parse_size(text: str) -> tuple[int, int]:
    """Read a size such as "512x768". Returns width and height, in pixels.

    Raises:
        InvalidRequestError: it is written otherwise.
    """
    match = re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", text, re.ASCII)
    if match is None:
        raise InvalidRequestError(f"size is {shown(text)}; write WIDTHxHEIGHT in pixels, such as 512x512", param="size")
    return int(match[1]), int(match[2])
