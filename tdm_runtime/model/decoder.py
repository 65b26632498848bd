"""Latents -> pixels, in calls that fit into memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tdm_runtime.backends import Backend, ManyOutputs
from tdm_runtime.families import Family, family_of_vae
from tdm_runtime.families.latent_space import Cache, ClipDecoderModule, ClipParts, LatentGeometry, PartKind

Pixels = NDArray[np.uint8]

MAX_CALL_PIXELS = 1024 * 1024
"""Of one decoder call. A KL autoencoder of full size holds about 6 GB of activations for as many in float32."""
CLIP_CALL_PIXELS = 512 * 512
"""Of all frames of one call that decodes a part of a clip: about a picture's, which other pictures wait for."""
MAX_PART_PIXELS = 4 * 1024 * 1024
"""Of all frames of one part. Stock pipelines decode 9 frames of 720x480 pixels at once; larger parts are tiled."""
MAX_COMPILED_PART_PIXELS = 512 * 1024
"""The same for compiled parts on a CPU: OpenVINO takes 31 GiB for CogVideoX's 9 frames of 720x480, and 9.7 GiB for one
frame of 832x480 of Wan."""
TILE_OVERLAP = 0.25
"""Share of a tile's side that it has in common with the next."""


class Calls(NamedTuple):
    """Calls that decoding one sample takes."""

    number: int
    shape: tuple[int, ...]
    """Latents of about each call, [C, H, W] or [C, F, H, W]: calls of one shape cost the same."""


class Decoder:
    """Decoder of an autoencoder. Batches that are too large for one call are sliced, pictures that are, tiled."""

    def __init__(self, backend: Backend, downscale: int, max_call_pixels: int = MAX_CALL_PIXELS) -> None:
        self.backend = backend
        self.downscale = downscale
        """Pixels per latent, each side."""
        self._max_call_latents = max_call_pixels // downscale**2

    def decode(self, latents: Tensor) -> Pixels:
        """Return uint8 [B, H, W, 3] for latents [B, C, h, w], or [B, frames, H, W, 3] for latents [B, C, F, h, w].

        H = h * downscale, W = w * downscale.
        """
        samples_a_call = self._max_call_latents // math.prod(latents.shape[2:])
        if samples_a_call == 0:
            return np.stack([self._tiled(sample) for sample in latents])
        slices = [self.backend(part).cpu().numpy() for part in torch.split(latents, samples_a_call)]
        return slices[0] if len(slices) == 1 else np.concatenate(slices)

    def calls(self, shape: tuple[int, ...]) -> Calls:
        """Return the calls of a sample.

        Args:
            shape: of its latents, [C, H, W] or [C, F, H, W].
        """
        return Calls(1, shape)

    def steps(self, latents: Tensor) -> Iterator[Pixels | None]:
        """Decode one sample, latents [C, H, W] or [C, F, H, W], and stop after each of its `calls`.

        Yields:
            None after each call but the last; then the pixels.
        """
        yield self.decode(latents[None])[0]

    def preview(self, latents: Tensor) -> Pixels:
        """Return a look at samples [B, ...] that are not finished: the pictures, or the first frame of clips.

        The frame is uint8 [B, 1, H, W, 3].
        """
        return self.decode(latents[:, :, :1] if latents.ndim == 5 else latents)

    def _tiled(self, latents: Tensor) -> Pixels:
        """Decode one sample, latents [C, h, w] or [C, F, h, w], in overlapping tiles that fade into each other."""
        num_latent_frames = math.prod(latents.shape[1:-2])
        side = max(1, int((self._max_call_latents / num_latent_frames) ** 0.5))
        blend = _Blend(*(size * self.downscale for size in latents.shape[-2:]))
        for top, left in _tiles(latents.shape, side):
            tile = latents[None, ..., top : top + side, left : left + side].contiguous()
            blend.add(self.backend(tile)[0].cpu().numpy(), top * self.downscale, left * self.downscale)
        return blend.pixels()


class CompiledParts:
    """Backend that runs a decoder of clips part by part, with a program for each kind of part.

    As in `ClipParts`, `cache` is what the part before left, and None before the first part of a clip.
    """

    def __init__(self, decoder: type[ClipDecoderModule], programs: Mapping[PartKind, ManyOutputs]) -> None:
        """Take the family's decoder, which says how clips are cut, and the program of each of its kinds."""
        self.decoder = decoder
        self.cache: Cache | None = None
        first = next(iter(programs.values()))
        self.device = first.device
        self.is_batch_invariant = first.is_batch_invariant
        self._programs = {(kind.latent_frames, kind.is_first): program for kind, program in programs.items()}

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Return the pixels of the next part of a clip. The only input is its latents, [B, C, F, h, w]."""
        (latents,) = inputs
        program = self._programs[latents.shape[2], self.cache is None]
        pixels, *left = program.outputs(latents, *(self.cache or ()))
        self.cache = tuple(left) or None
        return pixels


class ClipDecoder(Decoder):
    """Decoder of clips: whole parts of a clip a call, as its autoencoder allows, so that other calls come between.

    Frames that are too large even for one part are tiled, and each tile goes through its parts.
    """

    def __init__(
        self,
        backend: Backend,
        parts: ClipParts | CompiledParts,
        geometry: LatentGeometry,
        call_pixels: int = CLIP_CALL_PIXELS,
    ) -> None:
        """
        Args:
            backend: Runs `parts`.
            call_pixels: Pixels of all frames of a call. A call has more only if one part does.
        """
        super().__init__(backend, geometry.spatial_compression)
        self._parts = parts
        self._latent_pixels = geometry.spatial_compression**2 * (geometry.temporal_compression or 1)
        self._call_pixels = call_pixels
        needs_most = isinstance(parts, CompiledParts) and backend.device.type == "cpu"
        self._part_latents = (MAX_COMPILED_PART_PIXELS if needs_most else MAX_PART_PIXELS) // self._latent_pixels

    def calls(self, shape: tuple[int, ...]) -> Calls:
        cut, side = self._cut(shape), self._side(shape)
        of_the_first = (shape[0], cut[0][-1].stop, *(min(size, side) for size in shape[2:]))
        return Calls(len(cut) * sum(1 for _ in _tiles(shape, side)), of_the_first)

    def decode(self, latents: Tensor) -> Pixels:
        return np.stack([pixels for sample in latents for pixels in self.steps(sample) if pixels is not None])

    def steps(self, latents: Tensor) -> Iterator[Pixels | None]:
        side, cut = self._side(latents.shape), self._cut(latents.shape)
        blend = _Blend(*(size * self.downscale for size in latents.shape[-2:]))
        whole = None
        tiles = list(_tiles(latents.shape, side))
        for number, (top, left) in enumerate(tiles):
            tile = latents[None, ..., top : top + side, left : left + side]
            frames: list[Pixels] = []
            cache: Cache | None = None
            for call, parts in enumerate(cut):
                self._parts.cache = cache
                frames += [self.backend(tile[:, :, part].contiguous())[0].cpu().numpy() for part in parts]
                cache, self._parts.cache = self._parts.cache, None
                if call + 1 < len(cut):
                    yield None
            whole = np.concatenate(frames)
            if len(tiles) > 1:
                blend.add(whole, top * self.downscale, left * self.downscale)
            if number + 1 < len(tiles):
                yield None
        yield whole if len(tiles) == 1 else blend.pixels()

    def _cut(self, shape: Sequence[int]) -> list[list[slice]]:
        """Return the parts of each call, as slices of the latent frames."""
        frame = math.prod(min(size, self._side(shape)) for size in shape[2:]) * self._latent_pixels
        call_latents = self._call_pixels // frame
        calls: list[list[slice]] = []
        start = room = 0
        for size in self._parts.decoder.parts(shape[1]):
            if not calls or room < size:
                calls.append([])
                room = call_latents
            calls[-1].append(slice(start, start + size))
            start, room = start + size, room - size
        return calls

    def _side(self, shape: Sequence[int]) -> int:
        """Return the most latents along each side of a tile."""
        largest = max(self._parts.decoder.parts(shape[1]))
        if largest * shape[-2] * shape[-1] <= self._part_latents:
            return max(shape[-2:])
        return max(1, int((self._part_latents / largest) ** 0.5))


def preview_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of what `Decoder.preview` decodes of a sample: a picture, or the first latent frame."""
    return (shape[0], 1, *shape[2:]) if len(shape) == 4 else shape


class _Blend:
    """Tiles that fade into each other."""

    def __init__(self, height: int, width: int) -> None:
        """Take the size of the whole, in pixels."""
        self._size = height, width
        self._total: NDArray[np.float32] | None = None
        self._weights = np.zeros((height, width, 1), dtype=np.float32)

    def add(self, pixels: Pixels, top: int, left: int) -> None:
        """Add a tile, uint8 [..., H, W, 3], at its place in pixels."""
        height, width = self._size
        rows, columns = (slice(start, start + n) for start, n in zip((top, left), pixels.shape[-3:-1], strict=True))
        fade = np.outer(_fade(rows, height), _fade(columns, width))[..., None]
        if self._total is None:
            self._total = np.zeros((*pixels.shape[:-3], height, width, 3), dtype=np.float32)
        self._total[..., rows, columns, :] += fade * pixels
        self._weights[rows, columns] += fade

    def pixels(self) -> Pixels:
        """Return the whole, uint8 [..., H, W, 3]."""
        assert self._total is not None, "a picture has at least one tile"
        blended: Pixels = (self._total / self._weights).round().astype(np.uint8)
        return blended


def _tiles(shape: Sequence[int], side: int) -> Iterator[tuple[int, int]]:
    """Yield where tiles begin, (top, left) in latents."""
    for top in _tile_starts(shape[-2], side):
        for left in _tile_starts(shape[-1], side):
            yield top, left


def decoder_on(backend: Backend, geometry: LatentGeometry) -> Decoder:
    """Return the decoder that a backend runs: part by part, where its module can."""
    parts = getattr(backend, "module", backend)
    if isinstance(parts, ClipParts | CompiledParts):
        return ClipDecoder(backend, parts, geometry)
    return Decoder(backend, geometry.spatial_compression)


def torch_decoder(vae: Any, device: torch.device, threads: int | None = None, family: Family | None = None) -> Decoder:
    """Return the decoder of a diffusers VAE that is in memory already, run by PyTorch in float32.

    Args:
        family: family of the model; None takes the first that has such a VAE, which for AutoencoderKL makes pictures.

    Raises:
        CheckpointError: it is the VAE of no family.
    """
    from tdm_runtime.backends.pytorch import TorchBackend

    family = family or family_of_vae(vae)
    backend = TorchBackend(family.decoder(vae), device, threads=threads)
    return Decoder(backend, family.spatial_compression(vae.config))


def _tile_starts(size: int, side: int) -> Iterator[int]:
    """Where tiles begin: every one full, the last at the end, neighbours at least `TILE_OVERLAP` in common."""
    if size <= side:
        yield 0
        return
    stride = max(1, int(side * (1 - TILE_OVERLAP)))
    yield from range(0, size - side, stride)
    yield size - side


def _fade(tile: slice, whole: int) -> NDArray[np.float32]:
    """Weights of a tile along one side, positive everywhere: they rise from an edge over the overlap.

    Not from the picture's own edges: there the tile is right, and one that begins close by is not yet.
    """
    size = tile.stop - tile.start
    rising: NDArray[np.float32] = np.minimum(1.0, (np.arange(size) + 0.5) / (size * TILE_OVERLAP)).astype(np.float32)
    rising_from_start = rising if tile.start > 0 else np.ones_like(rising)
    return np.minimum(rising_from_start, rising[::-1] if tile.stop < whole else np.ones_like(rising))
