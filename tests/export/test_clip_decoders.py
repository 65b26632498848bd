"""Decoders of clips, compiled part by part, give the frames that the autoencoder gives at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX

from export.onnx_export import export_onnx
from tdm_runtime.backends import BackendName, ManyOutputs
from tdm_runtime.backends.interface import TensorSpec
from tdm_runtime.backends.opening import open_file
from tdm_runtime.families import FAMILIES
from tdm_runtime.families.latent_space import ClipDecoderModule, ClipPart, LatentGeometry, PartKind
from tdm_runtime.model.decoder import ClipDecoder, CompiledParts, decoder_on
from tests.export.test_families import small_vae
from tests.tiny_pipelines import wan_vae


def small_cogvideox_vae() -> AutoencoderKLCogVideoX:
    return AutoencoderKLCogVideoX(
        block_out_channels=(4, 4, 4),
        down_block_types=("CogVideoXDownBlock3D",) * 3,
        up_block_types=("CogVideoXUpBlock3D",) * 3,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    )


def small_wan_vae(**changes: Any) -> Any:
    levels = {"dim_mult": [2, 2], "temperal_downsample": [True], "num_res_blocks": 1}
    return wan_vae(**levels, scale_factor_spatial=2, scale_factor_temporal=2, **changes)


def small_wan_5b_vae() -> Any:
    return small_wan_vae(is_residual=True, patch_size=2, in_channels=12, out_channels=12, decoder_base_dim=4)


VAES: Mapping[str, tuple[str, Callable[[], Any]]] = {
    "cogvideox": ("cogvideox", small_cogvideox_vae),
    "wan": ("wan", small_wan_vae),
    "wan-5b": ("wan", small_wan_5b_vae),
    "animatediff": ("animatediff", small_vae),
}
"""Variant -> family and VAE of few levels, which is exported in half the time."""
BACKENDS: tuple[BackendName, ...] = ("onnxruntime", "openvino")
SIZES = ((1, 4, 6), (3, 6, 4), (7, 5, 3))
"""Latent frames, height and width of the clips. The programs are traced at 16x24."""


class Exported:
    """A small decoder and the files of its parts."""

    def __init__(self, variant: str, folder: Path) -> None:
        family, vae = VAES[variant]
        torch.manual_seed(0)
        module = FAMILIES[family].decoder(vae())
        assert isinstance(module, ClipDecoderModule)
        self.module = module
        self.folder = folder
        self.parts = [ClipPart(module, kind) for kind in module.kinds]
        self.interfaces = {part.kind: part.interface() for part in self.parts}
        for part in self.parts:
            export_onnx(part, self.interfaces[part.kind], self.file(part.kind), title=part.kind.name)

    def file(self, kind: PartKind) -> Path:
        return self.folder / f"{kind.name}.onnx"

    def decoder(self, backend: BackendName) -> ClipDecoder:
        """Return the decoder that runs the files, one part a call."""
        programs: dict[PartKind, ManyOutputs] = {}
        for kind, interface in self.interfaces.items():
            opened = open_file(backend, self.file(kind), interface, "fp32", threads=1)
            assert isinstance(opened, ManyOutputs)
            programs[kind] = opened
        parts = CompiledParts(type(self.module), programs)
        downscale = self.whole(torch.zeros(1, self.module.channels, 1, 1, 1)).shape[2]
        geometry = LatentGeometry("clips", self.module.channels, downscale, temporal_compression=1)
        return ClipDecoder(parts, parts, geometry, call_pixels=1)

    @torch.no_grad()
    def whole(self, latents: torch.Tensor) -> np.ndarray[Any, Any]:
        pixels: np.ndarray[Any, Any] = self.module(latents).numpy()
        return pixels


SLOW = {"cogvideox", "wan", "wan-5b"}
"""Variants that take long to export. `tests/tdm_runtime/model/test_clip_decoder.py` runs their parts in torch."""


@pytest.fixture(scope="module", params=[pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in VAES])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return Exported(request.param, tmp_path_factory.mktemp(request.param))


def latents_of(exported: Exported, clips: int, *shape: int) -> torch.Tensor:
    return torch.randn(clips, exported.module.channels, *shape, generator=torch.Generator().manual_seed(1))


def assert_same_frames(actual: Any, expected: Any) -> None:
    """Levels may differ by one where torch and the backend round a half apart."""
    assert actual.shape == expected.shape and expected.std() > 5
    off = np.abs(actual.astype(int) - expected.astype(int))
    assert off.max() <= 1 and off.mean() < 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_parts_of_a_clip_are_the_autoencoders_whole(exported: Exported, backend: BackendName) -> None:
    decoder = exported.decoder(backend)
    for shape in SIZES:
        latents = latents_of(exported, 1, *shape)
        assert decoder.calls(tuple(latents.shape[1:])).number == len(exported.module.parts(shape[0]))
        assert_same_frames(decoder.decode(latents), exported.whole(latents))


@pytest.mark.parametrize("backend", BACKENDS)
def test_decodes_of_two_clips_may_take_turns(exported: Exported, backend: BackendName) -> None:
    decoder, latents = exported.decoder(backend), latents_of(exported, 2, 5, 4, 6)
    turns = list(zip(decoder.steps(latents[0]), decoder.steps(latents[1]), strict=True))
    assert len(turns) > 1
    for made, clip in zip(turns[-1], latents.split(1), strict=True):
        assert_same_frames(made, exported.whole(clip)[0])


def test_every_family_of_clips_is_tested() -> None:
    assert {family for family, _ in VAES.values()} == {name for name, one in FAMILIES.items() if one.makes_clips}


def test_only_parts_that_need_it_take_and_leave_a_cache(exported: Exported) -> None:
    for kind, interface in exported.interfaces.items():
        cache = [spec.shape for spec in interface.inputs[1:]]
        left = [spec.shape for spec in interface.further_outputs]
        assert bool(cache) == (not kind.is_first)
        assert bool(left) == kind.leaves_cache
        assert not cache or cache == left
        assert interface.size_names == ("batch", "height", "width")


def test_decoders_run_on_their_parts(exported: Exported) -> None:
    decoder = exported.decoder("onnxruntime")
    geometry = LatentGeometry("clips", exported.module.channels, decoder.downscale, temporal_compression=1)
    assert isinstance(decoder_on(decoder.backend, geometry), ClipDecoder)


def test_a_multiple_of_a_size_is_filled_in() -> None:
    spec = TensorSpec("cache_0", "float32", ("batch", 8, "height_x4", "width_x2", "width_px"))
    assert spec.resolve({"batch": 2, "height": 3, "width": 5, "width_px": 7}) == (2, 8, 12, 10, 7)
