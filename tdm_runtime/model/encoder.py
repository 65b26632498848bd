"""Pictures -> latents, for edits."""

from __future__ import annotations

import math
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tdm_runtime.backends import Backend
from tdm_runtime.edit import GivenPicture
from tdm_runtime.model.decoder import MAX_CALL_PIXELS

CACHED_PICTURES = 32
"""Most pictures whose latents are kept, for further edits of one picture."""


class EncodedPicture(NamedTuple):
    """Distribution of a picture's latents, [C, h, w] each."""

    mean: Tensor
    std: Tensor
    """Zeros where the autoencoder has no distribution."""

    @property
    def is_sampled(self) -> bool:
        """Whether latents are drawn from a distribution, as stock pipelines do where there is one."""
        return bool(self.std.any())


class PictureEncoder:
    """Encoder of an autoencoder. It keeps the latents of the latest pictures. Only `expect` is thread-safe."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._cache: OrderedDict[str, EncodedPicture] = OrderedDict()

    @property
    def shares_calls(self) -> bool:
        """Whether pictures share calls. They do not where their bits would depend on their company."""
        return self.backend.is_batch_invariant

    def expect(self, picture: GivenPicture) -> bool:
        """Return whether a picture has to be encoded."""
        return picture.picture_key not in self._cache

    def encode_all(self, pictures: Sequence[GivenPicture]) -> list[EncodedPicture]:
        """Return the latents of pictures. Those of one size that are not cached share calls."""
        by_key = {picture.picture_key: picture for picture in pictures}
        found = {key: known for key in by_key if (known := self._cache.get(key)) is not None}
        by_size: defaultdict[tuple[int, ...], list[str]] = defaultdict(list)
        for key in (key for key in by_key if key not in found):
            by_size[by_key[key].pixels.shape].append(key)
        for missing in by_size.values():
            pixels = torch.stack([by_key[key].to_tensor() for key in missing])
            latents = self.encode(pixels.to(self.backend.device))
            found |= {key: EncodedPicture(*one.chunk(2)) for key, one in zip(missing, latents, strict=True)}
        for key in by_key:
            self._cache[key] = found[key]
            self._cache.move_to_end(key)
        while len(self._cache) > CACHED_PICTURES:
            self._cache.popitem(last=False)
        return [found[picture.picture_key] for picture in pictures]

    def encode(self, pixels: Tensor) -> Tensor:
        """Return [B, 2C, h, w], means then standard deviations, for pixels [B, 3, H, W] in [-1, 1]."""
        pictures_a_call = max(1, MAX_CALL_PIXELS // math.prod(pixels.shape[2:])) if self.shares_calls else 1
        return torch.cat([self.backend(part) for part in torch.split(pixels, pictures_a_call)])
