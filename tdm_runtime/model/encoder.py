"""Pictures -> latents, for edits."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tdm_runtime.backends import Backend
from tdm_runtime.edit import Edit
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

    def expect(self, edit: Edit) -> bool:
        """Return whether a picture has to be encoded."""
        return edit.picture_digest not in self._cache

    def encode_all(self, edits: Sequence[Edit]) -> list[EncodedPicture]:
        """Return the latents of pictures of one size. Those that are not cached share calls."""
        by_digest = {edit.picture_digest: edit for edit in edits}
        found = {digest: known for digest in by_digest if (known := self._cache.get(digest)) is not None}
        missing = [digest for digest in by_digest if digest not in found]
        if missing:
            pixels = torch.stack([by_digest[digest].to_tensor() for digest in missing])
            latents = self.encode(pixels.to(self.backend.device))
            found |= {digest: EncodedPicture(*one.chunk(2)) for digest, one in zip(missing, latents, strict=True)}
        for digest in by_digest:
            self._cache[digest] = found[digest]
            self._cache.move_to_end(digest)
        while len(self._cache) > CACHED_PICTURES:
            self._cache.popitem(last=False)
        return [found[edit.picture_digest] for edit in edits]

    def encode(self, pixels: Tensor) -> Tensor:
        """Return [B, 2C, h, w], means then standard deviations, for pixels [B, 3, H, W] in [-1, 1]."""
        pictures_a_call = max(1, MAX_CALL_PIXELS // math.prod(pixels.shape[2:])) if self.shares_calls else 1
        return torch.cat([self.backend(part) for part in torch.split(pixels, pictures_a_call)])
