"""Parities: structural similarity, relative error, and the measurement of builds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from export.prompts import CALIBRATION
from export.verify import component_parity, parity_table, verify
from tdm_runtime.checkpoint.folder import open_checkpoint
from tdm_runtime.checkpoint.manifest import ComponentParity, Manifest, PictureParity, kernel_choice, load_manifest
from tdm_runtime.model.components import load_component
from tdm_runtime.model.decoder import Pixels
from tdm_runtime.model.parity import PROMPTS, ParityConfig
from tdm_runtime.model.similarity import EQUAL_DB, psnr_db, ssim
from tests.stock_checkpoints import CASES, save_checkpoint

TWO_PROMPTS = ("a red apple", "a cat left of a dog")


def noise(seed: int, height: int = 16, width: int = 24) -> Pixels:
    drawn: Pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return drawn


def scene(height: int = 48, width: int = 48) -> Pixels:
    """Return a picture of a disc on a colour gradient, with values in [40, 215]."""
    y, x = np.mgrid[:height, :width]
    slope = np.stack([x / width, y / height, (x + y) / (width + height)], axis=-1)
    disc = ((y - height / 2) ** 2 + (x - width / 2) ** 2 < (height / 3) ** 2)[..., None]
    return np.where(disc, 215 - 60 * slope, 40 + 120 * slope).astype(np.uint8)


def with_noise(picture: Pixels, levels: int) -> Pixels:
    """Return the picture with every value moved up or down by `levels`."""
    signs = np.random.default_rng(0).choice([-levels, levels], picture.shape)
    return (picture + signs).astype(np.uint8)


# -- SSIM ------------------------------------------------------------------------------------------


def reference_ssim(a: Pixels, b: Pixels) -> float:
    """Compute SSIM window by window (Wang et al. 2004, equations 13 to 16)."""
    offsets = np.arange(11) - 5
    weights = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    found = []
    for channel in range(3):
        for top in range(a.shape[0] - 10):
            for left in range(a.shape[1] - 10):
                x, y = (p[top : top + 11, left : left + 11, channel].astype(np.float64) for p in (a, b))
                mx, my = (weights * x).sum(), (weights * y).sum()
                vx, vy = (weights * (x - mx) ** 2).sum(), (weights * (y - my) ** 2).sum()
                cov = (weights * (x - mx) * (y - my)).sum()
                found.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return float(np.mean(found))


@pytest.mark.parametrize(
    "other", [noise(1), with_noise(scene(16, 24), 20), scene(16, 24)], ids=["noise", "near", "far"]
)
def test_ssim_equals_the_formula_of_the_paper(other: Pixels) -> None:
    assert ssim(scene(16, 24), other) == pytest.approx(reference_ssim(scene(16, 24), other), abs=1e-9)


@settings(deadline=None)
@given(seeds=st.tuples(st.integers(0, 99), st.integers(0, 99)))
def test_ssim_is_symmetric_and_1_only_for_equal_pictures(seeds: tuple[int, int]) -> None:
    a, b = map(noise, seeds)
    assert ssim(a, b) == pytest.approx(ssim(b, a), abs=1e-12)
    assert (ssim(a, b) > 1 - 1e-9) == (seeds[0] == seeds[1])


def test_ssim_falls_with_noise() -> None:
    levels = (0, 2, 5, 10, 20, 40)
    found = [ssim(scene(), with_noise(scene(), level)) for level in levels]
    assert found == sorted(found, reverse=True)
    assert found[0] == pytest.approx(1) and found[-1] < 0.5


def test_ssim_is_higher_for_a_brightness_shift_than_for_noise_of_the_same_psnr() -> None:
    """For flat pictures the formula depends on the means only."""
    shifted, noisy = scene() + np.uint8(20), with_noise(scene(), 20)
    assert psnr_db(scene(), shifted) == psnr_db(scene(), noisy)
    assert ssim(scene(), shifted) > 0.9 > ssim(scene(), noisy)
    dark, bright = np.full((16, 16, 3), 60, np.uint8), np.full((16, 16, 3), 90, np.uint8)
    c1 = (0.01 * 255) ** 2
    assert ssim(dark, bright) == pytest.approx((2 * 60 * 90 + c1) / (60**2 + 90**2 + c1), abs=1e-9)


# -- components ------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [0.0, 1e-3, 0.5])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_relative_error_is_found_at_any_scale(error: float, scale: float) -> None:
    expected = scale * torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    parity = component_parity(expected, expected * (1 + error))
    assert parity.relative_l2 == pytest.approx(error, abs=1e-12)
    assert parity.max_abs == pytest.approx(error * expected.abs().max().item(), abs=1e-12 * scale)


def test_max_abs_finds_one_wrong_value() -> None:
    expected = torch.full((2, 8, 8, 3), 100, dtype=torch.uint8)
    for level, difference in ((97, 3), (255, 155), (0, 100)):  # uint8 differences would wrap around
        actual = expected.clone()
        actual[1, 2, 3, 0] = level
        parity = component_parity(expected, actual)
        assert parity.max_abs == difference
        assert parity.relative_l2 == pytest.approx(difference / (100 * expected.numel() ** 0.5))


def test_an_output_with_nan_has_no_finite_parity() -> None:
    expected = torch.ones(2, 4)
    assert not component_parity(expected, torch.full((2, 4), float("nan"))).relative_l2 < float("inf")


# -- a manifest ------------------------------------------------------------------------------------


@pytest.fixture
def manifest(tiny_checkpoint: Path, tiny_artifacts: Path) -> Manifest:
    return load_manifest(tiny_artifacts, open_checkpoint(tiny_checkpoint))


def test_every_build_component_and_step_count_is_measured(tiny_checkpoint: Path, manifest: Manifest) -> None:
    recipe = open_checkpoint(tiny_checkpoint).recipe
    for build in manifest.builds:
        assert tuple(build.pictures) == recipe.step_counts
        assert build.measured_on == kernel_choice(build)
        assert list(build.components) == ["text_encoder", "encoder", "denoiser", "decoder", "tiny_decoder"]
        for component in build.components.values():
            assert component.parity is not None
        for found in build.pictures.values():
            assert found.min_psnr_db <= found.psnr_db <= EQUAL_DB and found.ssim <= 1 + 1e-9


def test_no_prompt_is_both_calibrated_and_compared_with() -> None:
    assert not set(CALIBRATION) & set(PROMPTS)


def test_a_spent_budget_cuts_prompts_and_not_step_counts(
    tiny_checkpoint: Path, tiny_artifacts: Path, manifest: Manifest
) -> None:
    """The parity of int8 differs between prompts, so it shows which prompts were compared."""
    checkpoint = open_checkpoint(tiny_checkpoint)
    build = manifest.find("openvino", "int8")
    assert build is not None
    only = replace(manifest, builds=(build,))
    cut, first = (
        verify(checkpoint, only, tiny_artifacts, config).builds[0].pictures
        for config in (ParityConfig(TWO_PROMPTS, budget_s=0.0), ParityConfig(TWO_PROMPTS[:1]))
    )
    assert tuple(cut) == checkpoint.recipe.step_counts
    assert cut == first != build.pictures


def test_the_table_has_a_row_for_every_measurement(manifest: Manifest) -> None:
    rows = parity_table(manifest).splitlines()
    for build in manifest.builds:
        for name, component in build.components.items():
            assert component.parity is not None
            (row,) = [row for row in rows if row.startswith(f"| {build.name} | {name} |")]
            assert f"{component.parity.relative_l2:.1e}" in row
            assert row.endswith(" levels |") == name.endswith("decoder")
        for steps, found in build.pictures.items():
            assert (
                f"| {build.name} | {steps} | {found.psnr_db:.1f} | {found.min_psnr_db:.1f} | {found.ssim:.4f} |" in rows
            )


def test_the_table_leaves_out_what_was_not_measured(manifest: Manifest) -> None:
    bare = replace(manifest.builds[0], components={}, pictures={})
    assert bare.name not in parity_table(replace(manifest, builds=(bare,)))
    one = replace(
        bare,
        components={"denoiser": replace(manifest.builds[0].components["denoiser"], parity=ComponentParity(0.5, 2.0))},
        pictures={3: PictureParity(41.26, 38.0, 0.98765)},
    )
    table = parity_table(replace(manifest, builds=(one,)))
    assert f"| {one.name} | denoiser | 5.0e-01 | 2 |" in table
    assert f"| {one.name} | 3 | 41.3 | 38.0 | 0.9877 |" in table


@pytest.mark.parametrize("case", ["SANA-Sprint", "SDXL-Lightning"])
def test_components_of_models_with_further_inputs_are_measured(case: str, tmp_path: Path) -> None:
    """The denoiser reads prompts of any length, a guidance scale or the size of the picture."""
    checkpoint = open_checkpoint(save_checkpoint(CASES[case], tmp_path / "folder"))
    interfaces = {"denoiser": load_component(checkpoint, "denoiser")[1]}
    manifest = Manifest(checkpoint.recipe.name, checkpoint.fingerprint, {}, {}, 20, interfaces, {}, ())
    assert verify(checkpoint, manifest, tmp_path, ParityConfig(("a fox",))) == manifest
