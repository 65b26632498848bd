"""`<lora:NAME:SCALE>` in prompts with `prompt_syntax` "a1111": it chooses the served LoRA of that name."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypeVar, cast

from serving.errors import APIError, invalid
from tdm_runtime.families.prompt_weights import LORA_TAG

if TYPE_CHECKING:
    from serving.schema.image_request import ImageRequest, RecipeOf
    from serving.schema.video_request import VideoRequest

Request = TypeVar("Request", bound="ImageRequest | VideoRequest")


def with_lora(request: Request, recipe_of: RecipeOf) -> Request:
    """Return the request with `model` and `lora_scale` in place of the tag in its prompt.

    Raises:
        APIError: 400, more than one tag, no such LoRA on this server, or fields that contradict the tag.
    """
    tags = LORA_TAG.findall(request.prompt) if request.prompt_syntax == "a1111" else []
    if not tags:
        return request
    if len(tags) > 1:
        raise _wrong(f"the prompt has {len(tags)} tags <lora:...>; a picture takes one LoRA, leave one")
    (name, scale), *_ = tags
    try:
        is_lora = recipe_of(name).lora_scale is not None
    except APIError as error:
        raise _wrong(f"the prompt names the LoRA {name[:64]!r}: {error.message}; take it out of the prompt") from None
    if not is_lora:
        raise _wrong(f"the prompt names {name!r} as a LoRA, which is a model of its own here; name it by model")
    if request.model not in (None, name):
        message = f"model is {request.model!r} and the prompt names the LoRA {name!r}, a model too; leave model out"
        raise invalid(message, "model", "invalid_value")
    changes: dict[str, object] = {"model": name, "prompt": LORA_TAG.sub("", request.prompt).strip()}
    if scale:
        if request.lora_scale not in (None, value := _number(scale)):
            message = (
                f"lora_scale is {request.lora_scale:g} and the prompt has <lora:{name}:{scale[:16]}>; leave one out"
            )
            raise invalid(message, "lora_scale", "invalid_value")
        changes["lora_scale"] = value
    return cast("Request", request.model_copy(update=changes))


def _number(scale: str) -> float:
    try:
        value = float(scale)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise _wrong(f"the scale of a LoRA in the prompt is {scale[:32]!r}; write one number, as in <lora:name:0.8>")
    return value


def _wrong(message: str) -> APIError:
    return invalid(message, "prompt", "invalid_value")
