"""Recent demand. No tensors."""

from __future__ import annotations

import math
from collections import deque

RETURN_WEIGHT = 0.1
"""EMA weight of the latest answer in what is known of clients that return."""
MOST_RETURN = 0.8
"""Share of answers that a new request follows soon, from which on clients count as returning."""
RETURN_DEVIATIONS = 3.0
"""Mean absolute deviations after the mean delay until which a client is expected back."""


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


class Returns:
    """Whether clients ask again as soon as they are answered, and how soon.

    Each answer is paired with the next arrival that is not paired yet. Random arrivals seldom fall so soon after an
    answer, so it tells clients that wait for their answers from others without knowing who asks.
    """

    def __init__(self) -> None:
        self._unpaired: deque[float] = deque()
        """Times of answers, monotonic."""
        self._share = 0.0
        self._delay_s = 0.0
        self._deviation_s = 0.0

    @property
    def are_usual(self) -> bool:
        """Whether most clients return."""
        return self._share >= MOST_RETURN

    def answered(self, now_s: float) -> None:
        """Note an answer."""
        self._unpaired.append(now_s)

    def arrived(self, now_s: float, window_s: float) -> None:
        """Note an arrival. Answers older than `window_s` brought no client back."""
        self._drop(now_s, window_s)
        if not self._unpaired:
            return
        delay_s = now_s - self._unpaired.popleft()
        self._share += RETURN_WEIGHT * (1 - self._share)
        self._deviation_s += RETURN_WEIGHT * (abs(delay_s - self._delay_s) - self._deviation_s)
        self._delay_s += RETURN_WEIGHT * (delay_s - self._delay_s)

    def expected(self, now_s: float, window_s: float) -> tuple[int, float]:
        """Return how many clients are still expected, and the seconds until the last of them should be here."""
        self._drop(now_s, window_s)
        if not self._unpaired:
            return 0, 0.0
        due_s = self._delay_s + RETURN_DEVIATIONS * self._deviation_s
        return len(self._unpaired), self._unpaired[-1] + min(due_s, window_s) - now_s

    def _drop(self, now_s: float, window_s: float) -> None:
        while self._unpaired and self._unpaired[0] + window_s < now_s:
            self._unpaired.popleft()
            self._share -= RETURN_WEIGHT * self._share
