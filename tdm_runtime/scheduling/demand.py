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


class Demand:
    """Recent demand of requests that arrive by chance.

    A client that asks again only when it is answered is no queue, however often it asks, so requests that find the
    engine idle cannot simply be counted. But requests that arrive by chance find it idle as often as it is idle (PASTA,
    Wolff 1982), so those that find it busy tell how many there are.
    """

    def __init__(self) -> None:
        self._all = MovingRate()
        self._waiting = MovingRate()

    def add(self, amount: float, is_busy: bool, now_s: float, window_s: float) -> None:
        """Count a request.

        Args:
            is_busy: Whether it found the engine busy.
        """
        self._all.add(amount, now_s, window_s)
        if is_busy:
            self._waiting.add(amount, now_s, window_s)

    def per_second(self, now_s: float, window_s: float, busy: float, less: float = 0.0) -> float:
        """Return the amount a second, without `less` of the amount counted at `now_s`.

        Args:
            busy: Share of the time in which the engine was busy, in [0, 1].
        """
        most = self._all.per_second(now_s, window_s, less)
        waiting = self._waiting.per_second(now_s, window_s, less)
        return min(most, waiting / busy) if busy else 0.0
