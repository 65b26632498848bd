"""Recent demand. No tensors."""

from __future__ import annotations

import math


class MovingRate:
    """Recent rate of arrivals, weighted by an exponential window."""

    def __init__(self) -> None:
        self._weight = 0.0
        self._seen_s = 0.0

    def add(self, amount: float, now_s: float, window_s: float) -> None:
        """Count `amount`. Its weight falls to 1/e in `window_s`."""
        self._weight = self._faded(now_s, window_s) + amount
        self._seen_s = now_s

    def per_second(self, now_s: float, window_s: float, less: float = 0.0) -> float:
        """Return the amount a second, without `less` of the amount counted at `now_s`."""
        return max(0.0, self._faded(now_s, window_s) - less) / window_s

    def _faded(self, now_s: float, window_s: float) -> float:
        return self._weight * math.exp(-max(0.0, now_s - self._seen_s) / window_s)
