"""A clip is decoded in several calls, which together give what its autoencoder gives at once."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tdm_runtime.backends.pytorch import TorchBackend
from tdm_runtime.families import FAMILIES
from tdm_runtime.families.latent_space import ClipPart, ClipParts, LatentGeometry
from tdm_runtime.model import decoder as decoder_module
from tdm_runtime.model.decoder import ClipDecoder, CompiledParts, decoder_on
from tdm_runtime.model.similarity import psnr_db
from tests.stock_checkpoints import CASES, stock_pipeline

CASES_OF_VAES = {
    "CogVideoX-2B": {1: (1,), 4: (2, 2), 5: (3, 2)},
    "Wan 2.1": {1: (1,), 4: (1, 1, 1, 1)},
    "Wan 2.2 5B": {3: (1, 1, 1)},
    "AnimateDiff-Lightning": {3: (1, 1, 1)},
}
"""Case -> latent frames -> the parts that they are decoded in."""
VARIANTS = [(name, frames) for name, clips in CASES_OF_VAES.items() for frames in clips]

MAX_LEVELS_APART = 1
"""torch's CPU kernels sum in another order at another number of pictures, as AnimateDiff's frames are."""


def parts_of(name: str) -> tuple[ClipParts, LatentGeometry]:
    case = CASES[name]
    pipeline, family = stock_pipeline(case), FAMILIES[case.family]
    denoiser = getattr(pipeline, family.denoiser_folder)
    module = family.decoder(pipeline.vae)
    return ClipParts(module), family.geometry(denoiser.config, pipeline.vae.config)  # type: ignore[arg-type]


def decoder_for_case(name: str, call_pixels: int) -> ClipDecoder:
    parts, geometry = parts_of(name)
    return ClipDecoder(TorchBackend(parts, torch.device("cpu")), parts, geometry, call_pixels)


def draw(clips: int, frames: int, height: int = 4, width: int = 6) -> torch.Tensor:
    return torch.randn(clips, 4, frames, height, width, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("call_pixels", [1, 10_000_000])
@pytest.mark.parametrize(("name", "frames"), VARIANTS)
@torch.no_grad()
def test_the_parts_of_a_clip_are_the_autoencoders_whole(name: str, frames: int, call_pixels: int) -> None:
    decoder, latents = decoder_for_case(name, call_pixels), draw(2, frames)
    module = parts_of(name)[0].decoder
    whole = np.concatenate([module(clip).numpy() for clip in latents.split(1)])
    assert whole.std() > 5
    np.testing.assert_allclose(decoder.decode(latents).astype(int), whole, rtol=0, atol=MAX_LEVELS_APART)
    sizes = CASES_OF_VAES[name][frames]
    calls = decoder.calls(tuple(latents.shape[1:]))
    assert calls.number == (len(sizes) if call_pixels == 1 else 1)
    *unfinished, last = decoder.steps(latents[1])
    assert unfinished == [None] * (calls.number - 1)
    assert last is not None
    np.testing.assert_allclose(last.astype(int), whole[1], rtol=0, atol=MAX_LEVELS_APART)


@pytest.mark.parametrize("name", CASES_OF_VAES)
def test_decodes_of_two_clips_may_take_turns(name: str) -> None:
    decoder, latents = decoder_for_case(name, 1), draw(2, max(CASES_OF_VAES[name]))
    alone = decoder.decode(latents)
    turns = list(zip(decoder.steps(latents[0]), decoder.steps(latents[1]), strict=True))
    assert len(turns) > 1
    for made, expected in zip(turns[-1], alone, strict=True):
        assert made is not None and np.array_equal(made, expected)


@pytest.mark.parametrize("name", CASES_OF_VAES)
def test_frames_that_are_too_large_are_tiled(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    latents = draw(1, max(CASES_OF_VAES[name]), height=12, width=20)
    whole = decoder_for_case(name, 1).decode(latents)
    pixels = whole[0][0].size // 3
    monkeypatch.setattr(decoder_module, "MAX_PART_PIXELS", 4 * pixels)
    tiled = decoder_for_case(name, 1)
    calls = tiled.calls(tuple(latents.shape[1:]))
    made = list(tiled.steps(latents[0]))
    assert len(made) == calls.number >= len(CASES_OF_VAES[name][latents.shape[2]])
    assert made[-1] is not None and made[-1].shape == whole[0].shape
    assert psnr_db(made[-1], whole[0]) > 20


class PartOnTorch:
    """A part as its compiled program runs: tensors in, tensors out."""

    device = torch.device("cpu")
    is_batch_invariant = True

    def __init__(self, part: ClipPart) -> None:
        self.part = part
        self.interface = part.interface()

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.outputs(*inputs)[0]

    def outputs(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        names = [spec.name for spec in self.interface.inputs]
        made: tuple[torch.Tensor, ...] = self.part(**dict(zip(names, inputs, strict=True)))
        for specs, tensors in ((self.interface.inputs, inputs), (self.interface.outputs, made)):
            height, width = inputs[0].shape[-2:]
            pixels = dict(zip(("height_px", "width_px"), made[0].shape[2:4], strict=True))
            sizes = {"batch": len(inputs[0]), "height": height, "width": width, **pixels}
            assert [tuple(tensor.shape) for tensor in tensors] == [spec.resolve(sizes) for spec in specs]
        return made


@pytest.mark.parametrize("name", CASES_OF_VAES)
@torch.no_grad()
def test_a_program_for_each_kind_of_part_decodes_clips_of_any_length(name: str) -> None:
    module, geometry = parts_of(name)[0].decoder, parts_of(name)[1]
    programs = CompiledParts(type(module), {kind: PartOnTorch(ClipPart(module, kind)) for kind in module.kinds})
    decoder = decoder_on(programs, geometry)
    assert isinstance(decoder, ClipDecoder)
    for latent_frames in (1, 3, 5, 7):
        latents = draw(2, latent_frames)
        whole = np.concatenate([module(clip).numpy() for clip in latents.split(1)])
        np.testing.assert_allclose(decoder.decode(latents).astype(int), whole, rtol=0, atol=MAX_LEVELS_APART)


def test_compiled_parts_are_tiled_earlier_on_a_cpu() -> None:
    """CogVideoX's 9 frames of 720x480 are one call of torch, and several of a compiled program."""
    parts, geometry = parts_of("CogVideoX-2B")
    module, shape = parts.decoder, (4, 3, 60, 90)
    programs = CompiledParts(type(module), {kind: PartOnTorch(ClipPart(module, kind)) for kind in module.kinds})
    on_torch = ClipDecoder(TorchBackend(parts, torch.device("cpu")), parts, geometry)
    calls, tiles = on_torch.calls(shape), ClipDecoder(programs, programs, geometry).calls(shape)
    assert calls.number == 1
    assert tiles.number > 6 and math.prod(tiles.shape[1:]) == 3 * 26 * 26


def test_a_decoder_without_parts_takes_one_call() -> None:
    parts, geometry = parts_of("Wan 2.1")
    decoder = decoder_on(TorchBackend(parts.decoder, torch.device("cpu")), geometry)
    latents = draw(1, 3)
    assert decoder.calls(tuple(latents.shape[1:])) == (1, tuple(latents.shape[1:]))
    (pixels,) = decoder.steps(latents[0])
    assert pixels is not None and pixels.shape == (9, 32, 48, 3)
