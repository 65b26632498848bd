"""Picture files that clients give: read within limits, and made into an `Edit` of the size to make.

A file may lie about everything, so its size is checked before its pixels are decoded.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from tdm_runtime.checkpoint.recipe import Recipe
from tdm_runtime.edit import Edit, GivenPicture, default_strength
from tdm_runtime.errors import InvalidRequestError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""Formats that are read, in Pillow's names. Of an animation the first frame is taken."""
MAX_GIVEN_PIXELS = 4096 * 4096
MAX_GIVEN_SIDE = 16384
"""Pixels of the longer side."""
MAX_ASPECT_ERROR = 0.02
"""Largest change of the aspect ratio that needs no warning."""


def read_picture(content: bytes) -> Image.Image:
    """Read a picture. It is turned as its EXIF data says, and what is transparent becomes white.

    Returns:
        An RGB picture.

    Raises:
        InvalidRequestError: it is no picture of `FORMATS`, damaged, or too large.
    """
    return _read(content, "image", _to_rgb)


def read_mask(content: bytes) -> Image.Image:
    """Read a mask. The picture changes where the mask is transparent or, without transparency, where it is white.

    Returns:
        A picture of mode L: 255 where the picture changes, 0 where it stays.

    Raises:
        InvalidRequestError: see `read_picture`.
    """
    return _read(content, "mask", _to_mask)


def inverted_mask(mask: Image.Image) -> bytes:
    """Return the file of a mask that changes what the given one keeps."""
    stream = io.BytesIO()
    ImageOps.invert(mask).save(stream, "PNG")
    return stream.getvalue()


def has_transparency(content: bytes) -> bool:
    """Return whether a picture that was read before has pixels that are not opaque."""
    with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
        return _least_alpha(picture) < 255  # decodes only what may be transparent


def to_edit(
    picture: Image.Image, strength: float | None, width: int, height: int, mask: Image.Image | None = None
) -> Edit:
    """Scale a picture and its mask to the size to make.

    Args:
        picture: RGB.
        strength: see `Edit`; None takes `default_strength`.
        width, height: in pixels.
        mask: mode L, in the size of the picture.

    Raises:
        InvalidRequestError: the strength is outside its range, or the mask has another size than the picture.
    """
    if mask is not None and mask.size != picture.size:
        sizes = [f"{one.width}x{one.height}" for one in (mask, picture)]
        raise InvalidRequestError(f"the mask is {sizes[0]} and the picture {sizes[1]}; send one size", param="mask")
    if strength is None:
        strength = default_strength(mask is not None)
    scaled = picture.resize((width, height), Image.Resampling.LANCZOS)
    pixels_of_mask = None
    if mask is not None:
        pixels_of_mask = np.array(mask.resize((width, height), Image.Resampling.NEAREST))
    return Edit(np.array(scaled), strength, pixels_of_mask)


def are_references(count: int, recipe: Recipe, starts_from_one: bool) -> bool:
    """Return whether given pictures are references: the model reads them, and it does not start from one.

    Args:
        count: number of pictures.
        starts_from_one: whether the request has a strength or a mask.

    Raises:
        InvalidRequestError: there is none, or more than the model takes.
    """
    rule = None if starts_from_one else recipe.references
    most = 1 if rule is None else rule.max_pictures
    if 1 <= count <= most:
        return rule is not None
    takes = f"{recipe.name} reads at most {most} references" if rule else f"{recipe.name} starts from one picture"
    remedy = f"send {'one' if most == 1 else 'fewer' if count else 'at least one'}"
    if rule is None and recipe.references is not None:
        remedy += ", or leave strength and mask out for references"
    raise InvalidRequestError(f"image holds {count} pictures; {takes}, {remedy}", param="image")


def to_references(pictures: Sequence[Image.Image], recipe: Recipe, starts_from_one: bool) -> tuple[GivenPicture, ...]:
    """Return RGB pictures as the model reads them; none where it starts from the picture.

    Raises:
        InvalidRequestError: see `are_references` and `ReferenceRule.fitted`.
    """
    if not pictures or not are_references(len(pictures), recipe, starts_from_one):
        return ()
    assert recipe.references is not None
    return tuple(map(recipe.references.fitted, pictures))


def distorts(picture: Image.Image, width: int, height: int) -> bool:
    """Return whether scaling a picture to a size, in pixels, visibly changes its aspect ratio."""
    return abs(math.log(picture.width / picture.height * height / width)) > MAX_ASPECT_ERROR


def _read(content: bytes, param: str, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
            width, height = picture.size
            if width * height > MAX_GIVEN_PIXELS or max(width, height) > MAX_GIVEN_SIDE:
                raise _too_large(param, f"{width}x{height}")
            picture.load()
            return convert(ImageOps.exif_transpose(picture))
    except UnidentifiedImageError:
        known = ", ".join(FORMATS)
        raise InvalidRequestError(f"{param} is no file of {known}; send one of these", param=param) from None
    except Image.DecompressionBombError:  # Pillow's own limit, when it opens the file
        raise _too_large(param, "far too large") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        reason = str(error)[:100] or type(error).__name__
        raise InvalidRequestError(f"{param} cannot be decoded: {reason}; send the whole file", param=param) from None


def _too_large(param: str, size: str) -> InvalidRequestError:
    limits = f"at most {MAX_GIVEN_PIXELS} pixels and {MAX_GIVEN_SIDE} along a side are read"
    return InvalidRequestError(f"{param} is {size}; {limits}, scale it down", param=param)


def _to_rgb(picture: Image.Image) -> Image.Image:
    picture = _with_8_bits(picture)
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    picture = picture.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")


def _to_mask(picture: Image.Image) -> Image.Image:
    picture = _with_8_bits(picture)
    if _least_alpha(picture) < 255:
        return ImageOps.invert(picture.convert("RGBA").getchannel("A"))
    return picture.convert("L")


def _least_alpha(picture: Image.Image) -> int:
    if not picture.has_transparency_data:
        return 255
    return int(np.asarray(picture.convert("RGBA").getchannel("A")).min())


def _with_8_bits(picture: Image.Image) -> Image.Image:
    """Return a picture of 8 bits a channel. Pillow would cut 16 bits off at 255."""
    if not picture.mode.startswith("I"):
        return picture
    return Image.fromarray((np.asarray(picture).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
