"""Intervals of means over a few seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean, stdev

STUDENT_T_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
"""Quantile of Student's t for a 95% interval, for 2 to 10 seeds; more seeds have less."""


def half_width(values: Sequence[float]) -> float:
    """Return the half-width of the mean's 95% interval by Student's t, for one number a seed. One seed gives inf."""
    if len(values) < 2:
        return math.inf
    return STUDENT_T_95[min(len(values), 10) - 2] * stdev(values) / math.sqrt(len(values))


def interval(values: Sequence[float], digits: int = 2) -> str:
    """Return the mean of one number a seed, with the half-width of its 95% interval by Student's t."""
    if not all(map(math.isfinite, values)):
        return "not finite"
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{mean(values):.{digits}f} ± {half_width(values):.{digits}f}"
