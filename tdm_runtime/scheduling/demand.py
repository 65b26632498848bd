"""How much is asked for just now. Knows no tensors."""

from __future__ import annotations

import math


class MovingRate:
    """Something a second, lately."""

    def __init__(self) -> None:
        self._weight = 0.0
        self._seen_s = 0.0

    def add(self, amount: float, now_s: float, window_s: float) -> None:
        """Count an arrival, whose weight falls to 1/e in `window_s`."""
        self._weight = self._faded(now_s, window_s) + amount
        self._seen_s = now_s

    def per_second(self, now_s: float, window_s: float, less: float = 0.0) -> float:
        """The rate, without `less` of what was counted just now."""
        return max(0.0, self._faded(now_s, window_s) - less) / window_s

    def _faded(self, now_s: float, window_s: float) -> float:
        return self._weight * math.exp(-max(0.0, now_s - self._seen_s) / window_s)
