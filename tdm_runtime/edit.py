"""Given pictures: `Edit` is one that a sample starts from, in place of pure noise; references are read beside it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torch import Tensor

from tdm_runtime.errors import InvalidRequestError, shown

SOFT_EDGE = 1 / 128
"""Standard deviation of a mask's soft edge, as a share of the picture's shorter side."""
MASKED = 128
"""Least value of a mask, 0..255, where the picture may change; as stock pipelines round it."""


def default_strength(has_mask: bool) -> float:
    """Return the strength of an edit that names none. What a mask covers is made anew."""
    return 1.0 if has_mask else 0.75


@dataclass(frozen=True)
class GivenPicture:
    """A picture that a client gives. Two are equal if their contents are."""

    pixels: NDArray[np.uint8] = field(compare=False, repr=False)
    """uint8 [H, W, 3]; of an `Edit` in the size of the picture to make."""
    picture_key: str = field(init=False)
    """sha256 of the pixels, and the size: what the latents depend on."""

    def __post_init__(self) -> None:
        self._set_key()

    def _set_key(self) -> hashlib._Hash:
        """Set `picture_key`. Returns the hash of the pixels."""
        content, (width, height) = hashlib.sha256(self.pixels.tobytes()), self.size
        object.__setattr__(self, "picture_key", f"{content.hexdigest()} {width}x{height}")
        return content

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, in pixels."""
        height, width, _ = self.pixels.shape
        return width, height

    def to_tensor(self) -> Tensor:
        """Return the picture as an encoder reads it, float32 [3, H, W] in [-1, 1]."""
        return torch.from_numpy(self.pixels.transpose(2, 0, 1).astype(np.float32) / 127.5 - 1.0)


def digest_of(references: Sequence[GivenPicture]) -> str:
    """Return the sha256 of reference pictures, in their order."""
    return hashlib.sha256("\n".join(one.picture_key for one in references).encode()).hexdigest()


@dataclass(frozen=True)
class ReferenceRule:
    """Which reference pictures a model reads, and how they are fitted."""

    max_pictures: int
    max_pixels: int
    """Largest area; larger pictures are scaled down to it."""
    multiple: int
    """Sides are cropped to multiples of it, in pixels."""
    min_side: int
    """Shortest side that a picture may have before it is fitted, in pixels."""
    max_ratio: int
    """Largest ratio of the sides."""

    def fitted(self, picture: Image.Image) -> GivenPicture:
        """Return a picture as the model reads it: at most `max_pixels`, then the middle of it.

        Args:
            picture: RGB.

        Raises:
            InvalidRequestError: the picture is too small or too narrow.
        """
        width, height = picture.size
        if min(width, height) < self.min_side or max(width, height) > self.max_ratio * min(width, height):
            raise InvalidRequestError(
                f"a reference picture is {width}x{height}; its sides must be at least {self.min_side} pixels and at "
                f"most {self.max_ratio}:1, scale or crop it",
                param="image",
            )
        if width * height > self.max_pixels:
            scale = math.sqrt(self.max_pixels / (width * height))
            width, height = int(width * scale), int(height * scale)
            picture = picture.resize((width, height), Image.Resampling.LANCZOS)
        left, top = width % self.multiple // 2, height % self.multiple // 2
        box = (left, top, left + width - width % self.multiple, top + height - height % self.multiple)
        return GivenPicture(np.array(picture.crop(box)))

    def check(self, references: Sequence[GivenPicture]) -> None:
        """Check reference pictures that were fitted.

        Raises:
            InvalidRequestError: there are too many, or one was not fitted.
        """
        if len(references) > self.max_pictures:
            raise InvalidRequestError(
                f"image holds {len(references)} pictures; at most {self.max_pictures} references are read, send fewer",
                param="image",
            )
        for width, height in (one.size for one in references):
            if height % self.multiple or width % self.multiple or not 0 < width * height <= self.max_pixels:
                raise InvalidRequestError(
                    f"a reference picture is {width}x{height}; its sides must be multiples of {self.multiple} with at "
                    f"most {self.max_pixels} pixels in all, use `ReferenceRule.fitted`",
                    param="image",
                )


@dataclass(frozen=True)
class Edit(GivenPicture):
    """A picture to start from, and where it may change.

    Raises:
        InvalidRequestError: the strength is outside its range, or mask and picture have different sizes.
    """

    strength: float
    """0 < strength <= 1: how much of the picture is made anew. Of K steps the last ceil(K strength) run."""
    mask: NDArray[np.uint8] | None = field(default=None, compare=False, repr=False)
    """uint8 [H, W]; the picture changes where it is at least `MASKED`. None changes all of it."""
    digest: str = field(init=False)
    """sha256 of picture and mask."""

    def __post_init__(self) -> None:
        if not isinstance(self.strength, int | float) or not 0.0 < self.strength <= 1.0:
            raise InvalidRequestError(
                f"strength is {shown(self.strength)}; it must be above 0, which keeps the picture, and at most 1",
                param="strength",
            )
        if self.mask is not None and self.mask.shape != self.pixels.shape[:2]:
            sizes = [f"{shape[1]}x{shape[0]}" for shape in (self.mask.shape, self.pixels.shape)]
            raise InvalidRequestError(f"the mask is {sizes[0]} and the picture {sizes[1]}; send one size", param="mask")
        content = self._set_key()
        if self.mask is not None:
            content.update(self.mask.tobytes())
        object.__setattr__(self, "digest", content.hexdigest())

    def num_steps(self, num_inference_steps: int) -> int:
        """Return how many of K steps really run, 1..K."""
        return max(1, math.ceil(num_inference_steps * self.strength - 1e-9))

    def kept_latents(self, height: int, width: int) -> Tensor | None:
        """Return float32 [1, h, w]: 1 for each latent none of whose pixels may change; None without a mask."""
        if self.mask is None:
            return None
        cells = self.mask.reshape(height, self.mask.shape[0] // height, width, self.mask.shape[1] // width)
        return torch.from_numpy((cells.max(axis=(1, 3)) < MASKED).astype(np.float32))[None]

    def blended(self, made: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return what was made where the mask allows it, and elsewhere the bits of the given picture.

        Args:
            made: uint8 [H, W, 3].
        """
        if self.mask is None:
            return made
        mixed = self.pixels + self._weights * (made.astype(np.float32) - self.pixels)
        blended: NDArray[np.uint8] = mixed.round().clip(0, 255).astype(np.uint8)
        return blended

    @cached_property
    def _weights(self) -> NDArray[np.float32]:
        """Share of what was made in each pixel, [H, W, 1]: 1 within the mask, falling to 0 around it."""
        assert self.mask is not None
        inside = Image.fromarray(np.where(self.mask >= MASKED, 255, 0).astype(np.uint8))
        soft = inside.filter(ImageFilter.GaussianBlur(SOFT_EDGE * min(self.mask.shape)))
        weights: NDArray[np.float32] = np.maximum(np.asarray(inside), np.asarray(soft))[..., None] / np.float32(255)
        return weights
