"""Decoding in slices and tiles gives the pictures of one call."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from tdm_runtime.backends import Backend
from tdm_runtime.backends.pytorch import TorchBackend
from tdm_runtime.checkpoint.folder import DEFAULT_CHECKPOINT, open_checkpoint
from tdm_runtime.families import DecoderModule
from tdm_runtime.model.decoder import TILE_OVERLAP, Decoder, Pixels, _tile_starts, torch_decoder
from tdm_runtime.model.loaded_model import LoadedModel, denoise
from tdm_runtime.model.similarity import psnr_db
from tdm_runtime.params import SamplingParams
from tdm_runtime.sampling.noise import initial_noise
from tdm_runtime.sampling.sampler import solve

CPU = torch.device("cpu")
DOWNSCALE = 4
SIDE = 16
"""Side of a tile in latents, the size that the embedded autoencoder was trained at."""
TILE_PIXELS = (SIDE * DOWNSCALE) ** 2
PROMPTS = (
    "a red apple",
    "a rocket on a blue background",
    "a cat left of a dog",
    "a pizza above a cup",
    "a butterfly on a green background",
    "a big yellow bus",
)
WHOLE_FLOOR_DB = 29.0
"""Lowest PSNR of a tiled picture. Group norms see the statistics of a tile, not of the picture: 30.2 to 47.4 dB are
measured here, and 27.4 for tiles without overlap."""
ALIKE_FLOOR_DB = 38.0
"""Lowest PSNR if all tiles have the picture's statistics. Then only the padding at their borders differs: 41.8 to
45.8 dB are measured here, and 27.3 to 31.3 for tiles without overlap."""
SEAM_LIMIT = 5.0
"""Levels by which neighbours at a tile's border may differ more than in the whole picture, where they differ by 8 on
average. 3.6 are measured, and 43 to 49 for tiles without overlap."""


class Watched:
    """A real backend that records the shapes of its inputs."""

    def __init__(self, backend: Backend) -> None:
        self.device = backend.device
        self._backend = backend
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, *inputs: Tensor) -> Tensor:
        self.shapes.append(tuple(inputs[0].shape))
        return self._backend(*inputs)


class EnlargingBackend:
    """A decoder that enlarges three of four channels, so each pixel depends on one latent only."""

    device = CPU

    def __call__(self, *inputs: Tensor) -> Tensor:
        (latents,) = inputs
        enlarged = latents[:, :3].repeat_interleave(DOWNSCALE, -1).repeat_interleave(DOWNSCALE, -2)
        return enlarged.movedim(1, -1).round().to(torch.uint8).contiguous()


@pytest.fixture(scope="module")
def backend() -> Backend:
    """The embedded autoencoder."""
    return TorchBackend(DecoderModule(open_checkpoint(DEFAULT_CHECKPOINT).load_vae()), CPU, threads=1)


@pytest.fixture(scope="module")
def scenes(model: LoadedModel) -> list[Tensor]:
    """Latents [4, 16, 16] made by the denoiser."""
    return list(_sampled(model))


@torch.inference_mode()
def _sampled(model: LoadedModel) -> Iterator[Tensor]:
    table = model.recipe.step_table(4, 64, 64)
    for seed, prompt in enumerate(PROMPTS):
        shape = model.latent_shape(SamplingParams(prompt, seed, 4, 64, 64))
        conditioning = model.text_encoder.encode(prompt).conditioning
        predict = partial(denoise, [model], step_counts=torch.tensor([4]), prompt=conditioning)
        *_, (latents, _) = solve(table, initial_noise(seed, (1, *shape)), predict)
        yield latents[0]


def mosaic(scenes: list[Tensor], rows: int, columns: int) -> Tensor:
    """Join scenes to the latents of one picture, [1, 4, 16 rows, 16 columns]."""
    lines = [torch.cat(scenes[row * columns : (row + 1) * columns], dim=-1) for row in range(rows)]
    return torch.cat(lines, dim=-2)[None]


# -- slices ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples_a_call", [1, 2, 4, 5])
def test_slices_equal_one_call_within_one_level(backend: Backend, scenes: list[Tensor], samples_a_call: int) -> None:
    """Sums over other batch sizes round differently."""
    latents = torch.stack(scenes)
    watched = Watched(backend)
    sliced = Decoder(watched, DOWNSCALE, max_call_pixels=samples_a_call * TILE_PIXELS).decode(latents)
    assert max(shape[0] for shape in watched.shapes) == samples_a_call
    assert sum(shape[0] for shape in watched.shapes) == len(scenes)
    whole = Decoder(backend, DOWNSCALE).decode(latents)
    assert sliced.shape == whole.shape == (len(scenes), 64, 64, 3)
    assert sliced.dtype == whole.dtype == np.uint8
    assert np.abs(sliced.astype(int) - whole).max() <= 1


def test_slices_keep_the_order_of_pictures(scenes: list[Tensor]) -> None:
    latents = torch.arange(10.0)[:, None, None, None].expand(-1, 4, 8, 8)
    decoded = Decoder(EnlargingBackend(), DOWNSCALE, max_call_pixels=3 * 32 * 32).decode(latents)
    np.testing.assert_array_equal(decoded[:, 0, 0, 0], np.arange(10))


def test_slices_of_clips_keep_every_frame() -> None:
    latents = torch.arange(10.0)[:, None, None, None, None].expand(-1, 4, 3, 8, 8)
    decoded = Decoder(EnlargingBackend(), DOWNSCALE, max_call_pixels=2 * 3 * 32 * 32).decode(latents)
    assert decoded.shape == (10, 3, 32, 32, 3)
    np.testing.assert_array_equal(decoded[:, 1, 0, 0, 0], np.arange(10))


# -- tiles -----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    side=st.integers(1, 24),
    batch=st.integers(1, 2),
    frames=st.sampled_from([(), (1,), (3,)]),
)
def test_tiles_of_a_local_decoder_equal_one_call(
    height: int, width: int, side: int, batch: int, frames: tuple[int, ...]
) -> None:
    """At any size no pixel is missing or moved: without context, tiling changes nothing."""
    shape = (batch, 4, *frames, height, width)
    latents = 255 * torch.rand(shape, generator=torch.Generator().manual_seed(height * width))
    watched = Watched(EnlargingBackend())
    num_latents = side**2 * math.prod(frames)
    tiled = Decoder(watched, DOWNSCALE, max_call_pixels=num_latents * DOWNSCALE**2).decode(latents)
    np.testing.assert_array_equal(tiled, EnlargingBackend()(latents).numpy())
    assert all(count * math.prod(sizes) <= num_latents for count, _, *sizes in watched.shapes)


@given(size=st.integers(1, 500), side=st.integers(4, 64))
def test_tiles_cover_a_side_and_overlap(size: int, side: int) -> None:
    starts = list(_tile_starts(size, side))
    assert starts[0] == 0 and starts[-1] + side >= size
    assert size <= side or starts[-1] + side == size
    for start, following in pairwise(starts):
        assert 0 < following - start <= side - int(side * TILE_OVERLAP)


@pytest.mark.parametrize(("height", "width"), [(32, 48), (32, 32), (23, 29), (17, 17), (16, 40)])
def test_a_tiled_picture_is_close_to_one_call(backend: Backend, scenes: list[Tensor], height: int, width: int) -> None:
    latents = mosaic(scenes, 2, 3)[..., :height, :width]
    tiled = Decoder(backend, DOWNSCALE, max_call_pixels=TILE_PIXELS).decode(latents)
    whole = Decoder(backend, DOWNSCALE).decode(latents)
    assert tiled.shape == whole.shape == (1, DOWNSCALE * height, DOWNSCALE * width, 3)
    assert psnr_db(tiled, whole) >= WHOLE_FLOOR_DB


def test_tiles_with_the_statistics_of_the_picture_are_closer(backend: Backend, scenes: list[Tensor]) -> None:
    """The picture repeats one scene, so every tile holds all of it, rolled."""
    for scene in scenes:
        latents = mosaic([scene] * 6, 2, 3)
        tiled = Decoder(backend, DOWNSCALE, max_call_pixels=TILE_PIXELS).decode(latents)
        assert psnr_db(tiled, Decoder(backend, DOWNSCALE).decode(latents)) >= ALIKE_FLOOR_DB


def steps_between_columns(pixels: Pixels) -> NDArray[np.float64]:
    """Return the mean absolute difference [W - 1] of each column from the next."""
    return np.abs(np.diff(pixels[0].astype(np.float64), axis=1)).mean(axis=(0, 2))


@pytest.mark.parametrize("width", [48, 29, 17])
def test_tiles_leave_no_seam(backend: Backend, scenes: list[Tensor], width: int) -> None:
    """At the borders of tiles, neighbours differ about as much as in the whole picture."""
    latents = mosaic(scenes, 2, 3)[..., :width]
    tiled = Decoder(backend, DOWNSCALE, max_call_pixels=TILE_PIXELS).decode(latents)
    whole = Decoder(backend, DOWNSCALE).decode(latents)
    starts = list(_tile_starts(width, SIDE))
    borders = [DOWNSCALE * start - 1 for start in starts[1:]]
    borders += [DOWNSCALE * (start + SIDE) - 1 for start in starts[:-1]]
    excess = steps_between_columns(tiled) - steps_between_columns(whole)
    assert excess[borders].max() <= SEAM_LIMIT


def test_a_picture_that_fits_is_not_tiled(backend: Backend, scenes: list[Tensor]) -> None:
    watched = Watched(backend)
    latents = mosaic(scenes, 2, 3)
    decoded = Decoder(watched, DOWNSCALE, max_call_pixels=6 * TILE_PIXELS).decode(latents)
    assert watched.shapes == [(1, 4, 32, 48)]
    np.testing.assert_array_equal(decoded, Decoder(backend, DOWNSCALE).decode(latents))


def test_torch_decoder_finds_the_scale_of_an_autoencoder(scenes: list[Tensor], backend: Backend) -> None:
    decoder = torch_decoder(open_checkpoint(DEFAULT_CHECKPOINT).load_vae(), CPU)
    assert decoder.downscale == DOWNSCALE
    latents = torch.stack(scenes[:2])
    np.testing.assert_array_equal(decoder.decode(latents), Decoder(backend, DOWNSCALE).decode(latents))
