"""How close two pictures are: peak signal-to-noise ratio and structural similarity."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

EQUAL_DB = 99.0
"""Ratio reported for equal pictures, whose true ratio is infinite; also the upper bound."""


def psnr_db(a: NDArray[Any], b: NDArray[Any], peak: float = 255.0) -> float:
    """Return the peak signal-to-noise ratio of two arrays of the same shape, in decibels, at most `EQUAL_DB`.

    Args:
        peak: largest possible difference of two values: 255 for uint8 pixels, 2 for pixels in [-1, 1].
    """
    error = float(np.square(np.subtract(a, b, dtype=np.float64)).mean())
    return EQUAL_DB if error == 0 else min(float(10 * np.log10(peak**2 / error)), EQUAL_DB)


def ssim(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """Return the mean structural similarity (Wang et al. 2004, sec. III-C).

    Args:
        a, b: uint8 [H, W, 3], or clips [F, H, W, 3], whose frames are compared one by one.
    """
    x, y = (torch.from_numpy(p.astype(np.float64)).movedim(-1, 0).flatten(0, -3)[:, None] for p in (a, b))
    offsets = torch.arange(11, dtype=torch.float64) - 5
    gaussian = torch.exp(-(offsets**2) / (2 * 1.5**2))
    window = torch.outer(gaussian, gaussian)[None, None] / gaussian.sum() ** 2

    def mean(values: Tensor) -> Tensor:
        return functional.conv2d(values, window)

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    return float(((2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))).mean())
