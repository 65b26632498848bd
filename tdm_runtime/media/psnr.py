"""Peak signal-to-noise ratio: how close two pictures are."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

EQUAL_DB = 99.0
"""Ratio reported for equal pictures, whose true ratio is infinite; also the upper bound."""


def psnr_db(a: NDArray[Any], b: NDArray[Any], peak: float = 255.0) -> float:
    """Return the peak signal-to-noise ratio of two arrays of the same shape, in decibels, at most `EQUAL_DB`.

    Args:
        peak: largest possible difference of two values: 255 for uint8 pixels, 2 for pixels in [-1, 1].
    """
    error = float(np.square(np.subtract(a, b, dtype=np.float64)).mean())
    return EQUAL_DB if error == 0 else min(float(10 * np.log10(peak**2 / error)), EQUAL_DB)
