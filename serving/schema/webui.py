"""Requests and answers of /sdapi/v1, the API of Stable Diffusion web UI (AUTOMATIC1111), which local clients speak.

Its clients send many settings of samplers and scripts that a few-step model does not have. So fields that are not known
here are ignored, and values that the model cannot take are replaced by the nearest ones; `info` has the warnings.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from serving.errors import invalid
from serving.schema.edit_request import EditRequest, bytes_of
from serving.schema.image_request import MAX_PICTURES, ImageRequest, RecipeOf
from serving.schema.image_response import to_base64
from serving.schema.order import ImageOrder
from serving.schema.parsing import validate
from serving.schema.prompt_tags import with_lora
from tdm_runtime.families.prompt_weights import LORA_TAG
from tdm_runtime.media.given_picture import inverted_mask, read_mask
from tdm_runtime.params import PromptSyntax

TITLE = re.compile(r"(.+?) \[[0-9a-f]{6,64}\]")
"""Title of a model: its name, and the start of its hash."""
IGNORED = ("negative_prompt", "styles", "enable_hr", "restore_faces", "tiling", "refiner_checkpoint", "script_name")
"""Fields whose effect a client may expect and does not get."""


class TextToImage(BaseModel):
    """Body of POST /sdapi/v1/txt2img."""

    model_config = ConfigDict(extra="allow", strict=False)

    prompt: str = ""
    negative_prompt: str | None = ""
    seed: int | None = -1
    steps: int | None = None
    width: int | None = Field(None, ge=1)
    height: int | None = Field(None, ge=1)
    batch_size: int | None = Field(1, ge=1)
    n_iter: int | None = Field(1, ge=1)
    send_images: bool | None = True
    override_settings: dict[str, Any] | None = None

    @property
    def wanted_model(self) -> str | None:
        """Name of the model that the request overrides the setting with."""
        title = (self.override_settings or {}).get("sd_model_checkpoint")
        return named_by(title) if isinstance(title, str) and title else None

    def to_order(self, model: str, recipe_of: RecipeOf, syntax: PromptSyntax) -> ImageOrder:
        """Return the order.

        Args:
            model: Model that makes it, unless the prompt names a LoRA.
            syntax: How the prompt is read.

        Raises:
            InvalidRequestError, APIError: a value has no near one that could be served.
        """
        recipe, warnings = recipe_of(model), list[str]()
        fields: dict[str, Any] = {"prompt": self.prompt, "prompt_syntax": syntax, **self._given()}
        if syntax == "plain" or LORA_TAG.search(self.prompt) is None:
            fields["model"] = model
        fields["n"] = (self.batch_size or 1) * (self.n_iter or 1)
        if fields["n"] > MAX_PICTURES:
            message = f"batch_size x n_iter is {fields['n']}; at most {MAX_PICTURES} pictures are made at once"
            raise invalid(message, "batch_size", "invalid_value")
        fields["seed"] = self.seed
        wanted = recipe.default_steps if self.steps is None else self.steps
        steps = fields["num_inference_steps"] = min(recipe.step_counts, key=lambda count: abs(count - wanted))
        if steps != wanted:
            warnings.append(f"steps is {wanted}; {recipe.name} took {steps}")
        if self.width and self.height:
            size = recipe.nearest_size(self.width, self.height)
            fields["size"] = f"{size[0]}x{size[1]}"
            if size != (self.width, self.height):
                warnings.append(f"the size is {self.width}x{self.height}; {recipe.name} made {size[0]}x{size[1]}")
        warnings += self._ignored()
        request = with_lora(validate(fields, self._kind()), recipe_of)
        return request.to_order(recipe_of(request.model)).warned(*warnings)

    def _kind(self) -> type[ImageRequest]:
        return ImageRequest

    def _given(self) -> Mapping[str, Any]:
        """Return the fields of the given picture."""
        return {}

    def _ignored(self) -> Iterator[str]:
        given = self.model_dump(exclude={"override_settings"})
        for name in IGNORED:
            if given.get(name):
                yield f"{name} changes nothing here"


class ImageToImage(TextToImage):
    """Body of POST /sdapi/v1/img2img."""

    init_images: list[str] = Field(min_length=1)
    denoising_strength: float | None = Field(0.75, gt=0, le=1)
    mask: str | None = None
    inpainting_mask_invert: Literal[0, 1] | bool | None = 0

    def _kind(self) -> type[ImageRequest]:
        return EditRequest

    def _given(self) -> Mapping[str, Any]:
        fields: dict[str, Any] = {"image": self.init_images, "strength": self.denoising_strength}
        if self.mask:
            mask: str | bytes = self.mask
            if self.inpainting_mask_invert:
                mask = inverted_mask(read_mask(bytes_of(self.mask, "mask")))
            fields["mask"] = mask
        return fields


class Options(BaseModel):
    """Body of POST /sdapi/v1/options. Other settings are accepted and change nothing."""

    model_config = ConfigDict(extra="allow")

    sd_model_checkpoint: str | None = None


class Generated(BaseModel):
    """Answer of txt2img and img2img."""

    images: list[str]
    """Files in base64."""
    parameters: dict[str, Any]
    """The request, without its pictures."""
    info: str
    """What was made, as JSON."""


def named_by(title: str) -> str:
    """Return the name of a model by its name or its title."""
    found = TITLE.fullmatch(title)
    return found[1] if found else title


def parameters_of(request: TextToImage) -> dict[str, Any]:
    """Return a request as its answer repeats it."""
    return request.model_dump(exclude={"init_images", "mask"})


def info_of(
    order: ImageOrder, seeds: list[int], digest: str, sampler: str, texts: list[str], warnings: list[str]
) -> str:
    """Return what was made, as the JSON text that clients decode."""
    first = order.pictures[0]
    found = {
        "prompt": first.prompt,
        "all_prompts": [first.prompt] * len(seeds),
        "negative_prompt": "",
        "all_negative_prompts": [""] * len(seeds),
        "seed": seeds[0],
        "all_seeds": seeds,
        "width": first.width,
        "height": first.height,
        "sampler_name": sampler,
        "cfg_scale": 1.0,
        "steps": first.num_inference_steps,
        "batch_size": len(seeds),
        "sd_model_name": order.model,
        "sd_model_hash": digest[:10],
        "infotexts": texts,
        "denoising_strength": None if first.edit is None else first.edit.strength,
        "warnings": warnings,
    }
    return json.dumps(found)


def generated(request: TextToImage, contents: list[bytes], info: str) -> Generated:
    """Return the answer to a request."""
    images = [] if request.send_images is False else [to_base64(content) for content in contents]
    return Generated(images=images, parameters=parameters_of(request), info=info)
