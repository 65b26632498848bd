"""Peak signal-to-noise ratio of known errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdm_runtime.model.decoder import Pixels
from tdm_runtime.model.similarity import EQUAL_DB, psnr_db


def noise(seed: int) -> Pixels:
    drawn: Pixels = np.random.default_rng(seed).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    return drawn


@settings(deadline=None)
@given(seeds=st.tuples(st.integers(0, 99), st.integers(0, 99)))
def test_psnr_is_symmetric_and_99_only_for_equal_pictures(seeds: tuple[int, int]) -> None:
    a, b = map(noise, seeds)
    assert psnr_db(a, b) == psnr_db(b, a)
    assert (psnr_db(a, b) == EQUAL_DB) == (seeds[0] == seeds[1])


@pytest.mark.parametrize("levels", [1, 2, 5, 10, 40])
def test_a_known_error_has_the_known_psnr(levels: int) -> None:
    """An error of d levels at every value, up or down, gives 20 log10(255 / d) dB."""
    picture = (40 + noise(0) * (175 / 255)).astype(np.uint8)
    signs = np.random.default_rng(1).choice([-levels, levels], picture.shape)
    expected_db = pytest.approx(20 * math.log10(255 / levels), abs=1e-9)
    assert psnr_db(picture, picture + np.uint8(levels)) == expected_db
    assert psnr_db(picture, (picture + signs).astype(np.uint8)) == expected_db


def test_black_against_white_is_0_db_in_either_order() -> None:
    """A difference computed in uint8 would wrap around."""
    black, white = np.zeros((16, 16, 3), np.uint8), np.full((16, 16, 3), 255, np.uint8)
    assert psnr_db(black, white) == psnr_db(white, black) == 0


def test_pixels_in_minus_1_to_1_have_the_psnr_of_their_levels() -> None:
    a, b = noise(0), noise(1)
    scaled = (pixels / 127.5 - 1 for pixels in (a, b))
    assert psnr_db(*scaled, peak=2.0) == pytest.approx(psnr_db(a, b), abs=1e-9)


def test_the_psnr_of_nan_is_nan() -> None:
    assert math.isnan(psnr_db(np.full((2, 2), np.nan), np.zeros((2, 2)), peak=2.0))
