"""Request of POST /v1/images/edits: a picture to change by a prompt."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from typing import Any, Literal

from PIL import Image
from pydantic import Field, PrivateAttr

from serving.errors import invalid
from serving.schema.image_request import ImageRequest, RecipeOf
from serving.schema.order import ImageOrder
from serving.schema.parsing import parse_picture_body, validate
from serving.schema.prompt_tags import with_lora
from tdm_runtime.checkpoint.recipe import Recipe
from tdm_runtime.edit import Edit, GivenPicture, ReferenceRule, default_strength
from tdm_runtime.media.given_picture import are_references, distorts, has_transparency, read_mask, read_picture, to_edit
from tdm_runtime.media.image_file import ImageFormat

DATA_URL = re.compile(r"data:[\w.+/-]*(;[\w=-]+)*;base64,")
ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)


def is_edit(fields: Collection[str]) -> bool:
    """Return whether the fields of a request are about a given picture."""
    return not {"image", "mask", "strength"}.isdisjoint(fields)


class EditRequest(ImageRequest):
    """Body of POST /v1/images/edits. Fields that a generation has too mean the same."""

    image: str | bytes | list[str | bytes] = Field(
        description="The picture: a file in a form; in JSON its bytes in base64, or a data URL. A list holds one, or "
        "the references of a model that reads several (`max_references` of its card)."
    )
    mask: str | bytes | None = Field(
        None, description="Where the picture changes: transparent there or, if it is opaque, white there."
    )
    strength: float | None = Field(
        None,
        gt=0,
        le=1,
        description="How much of the picture is made anew: of K steps the last ceil(K strength) run. "
        f"{default_strength(False)}, or {default_strength(True)} with a mask, when absent. A model that reads "
        "references reads the pictures as such when strength and mask are absent.",
    )
    size: str = Field("auto", description='"WxH" from the model\'s sizes; "auto" is the one nearest to the picture\'s.')
    input_fidelity: Literal["low", "high"] | None = Field(None, description="Accepted and unused, with a warning.")
    _fitted: tuple[GivenPicture, ...] | None = PrivateAttr(None)

    @cached_property
    def _contents(self) -> list[bytes]:
        pictures = self.image if isinstance(self.image, list) else [self.image]
        return [bytes_of(picture, "image") for picture in pictures]

    @cached_property
    def _picture(self) -> Image.Image:
        """Picture to start from."""
        return read_picture(self._contents[0])

    def _rule(self, recipe: Recipe) -> ReferenceRule | None:
        """Return the rule of the references; None where the model starts from the picture."""
        starts_from_one = self.strength is not None or self.mask is not None
        return recipe.references if are_references(len(self._contents), recipe, starts_from_one) else None

    def _references(self, recipe: Recipe) -> tuple[GivenPicture, ...]:
        if self._fitted is None and (rule := self._rule(recipe)) is not None:
            self._fitted = tuple(rule.fitted(read_picture(content)) for content in self._contents)
        return self._fitted or ()

    def _size(self, recipe: Recipe) -> tuple[int, int]:
        if self.size != "auto":
            return super()._size(recipe)
        references = self._references(recipe)
        return recipe.nearest_size(*(references[0] if references else self._picture).size)

    def _edit(self, recipe: Recipe, width: int, height: int) -> Edit | None:
        if self._rule(recipe) is not None:
            return None
        mask = None if self.mask is None else read_mask(bytes_of(self.mask, "mask"))
        return to_edit(self._picture, self.strength, width, height, mask)

    def _warnings(self, recipe: Recipe) -> Iterator[str]:
        yield from super()._warnings(recipe)
        if self.input_fidelity is not None:
            yield f"input_fidelity {self.input_fidelity} changes nothing; strength says how much is made anew"
        is_transparent = self.mask is None and any(map(has_transparency, self._contents))
        if self._references(recipe):
            if is_transparent:
                yield "the transparent parts of the pictures were made white"
            return
        width, height = self._size(recipe)
        if distorts(self._picture, width, height):
            yield (
                f"the picture is {self._picture.width}x{self._picture.height}; scaling it to {width}x{height} changes "
                "its shape, crop it first"
            )
        if is_transparent:
            yield "the picture's transparent parts were made white; send it as mask too to change only these"


def edit_order_from_body(
    body: bytes, recipe_of: RecipeOf, file_formats: Sequence[ImageFormat] = (), default_seed: int | None = None
) -> ImageOrder:
    """Read the JSON body of POST /v1/images/edits. Arguments and errors are those of `order_from_body`."""
    return _to_order(parse_picture_body(body, EditRequest), recipe_of, file_formats, default_seed)


def edit_order_from_fields(
    fields: dict[str, Any],
    recipe_of: RecipeOf,
    file_formats: Sequence[ImageFormat] = (),
    default_seed: int | None = None,
    is_text: bool = False,
) -> ImageOrder:
    """Read decoded fields, with files as bytes. Arguments and errors are those of `order_from_fields`."""
    return _to_order(validate(fields, EditRequest, is_text), recipe_of, file_formats, default_seed)


def _to_order(
    request: EditRequest, recipe_of: RecipeOf, file_formats: Sequence[ImageFormat], default_seed: int | None
) -> ImageOrder:
    request = with_lora(request, recipe_of)
    if file_formats:
        request = request.as_file(file_formats)
    return request.to_order(recipe_of(request.model), default_seed)


def bytes_of(given: str | bytes, param: str) -> bytes:
    """Return the bytes of a file that came as such, in base64 or in a data URL."""
    if isinstance(given, bytes):
        return given
    if found := DATA_URL.match(given):
        given = given[found.end() :]
    elif ADDRESS.match(given):
        raise invalid(f"{param} is {given[:40]!r}; no address is fetched, send the bytes", param, "invalid_value")
    try:
        return base64.b64decode("".join(given.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise invalid(f"{param} is no base64: {error}; send the file's bytes", param, "invalid_value") from None
