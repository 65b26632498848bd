"""How long calls take: learned at warm-up, kept current by every call, fading while none is made.

Knows no tensors and has no clock of its own: every time is an argument, monotonic.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple

WEIGHT = 0.1
"""Of the latest call in what is thought of the machine's speed."""
SLOW_WEIGHT = 0.02
"""Of the latest call in what is thought of its batch size beside others."""
MAX_SURPRISE = 4.0
"""A call counts as at most so many times what was expected: a stall of the machine is not the model's cost."""
MIN_GAIN = 0.05
"""A batch grows only where more pictures a second come of it, by at least this share."""
HALF_LIFE_S = 0.25
"""Time without a call of a kind after which half of what load taught about it is gone. The part that is left is
0.5^(t / half-life)^2: after a tenth of a half-life 99 %, so a busy engine forgets nothing between two calls; after a
second 0.002 %, so a client that comes a second after a burst finds no trace of it."""
HALF_LIFE_CALLS = 20
"""Calls that take one half-life, where that is more than `HALF_LIFE_S`: slow calls are far apart under load too."""


class Kind(NamedTuple):
    """Calls that cost the same at the same batch size."""

    stage: str
    """text, denoise, decode:full, decode:tiny, encode:png, ..."""
    shape: tuple[int, ...] = ()
    """Shape of one sample's latents, [C, H, W] or [C, F, H, W]; empty where it does not matter."""
    model: str = ""
    """Whose programs run it, where there are several models."""


class Mood(NamedTuple):
    """What is expected of a kind of call at some time, whatever its size."""

    slowness: float
    """Times what its sizes take in `Estimate.seconds`."""
    deviation: float
    """Usual distance of a call from what was expected, as a share of it."""


@dataclass
class Estimate:
    """One kind of call: how its sizes compare, and how fast the machine is just now.

    The two are told apart because a machine has moods. A size that happened to run in a slow minute would
    otherwise look bad, not be used, and so never be seen to be good.

    Load is such a mood too. What calls under load teach fades while none is made, to what calm calls taught.
    """

    seconds: dict[int, float] = field(default_factory=dict)
    """Batch size -> seconds at a `slowness` of 1."""
    mood: Mood = Mood(1.0, 0.0)
    """As of the last call."""
    calm: Mood = Mood(1.0, 0.0)
    """What calm calls taught; never above `mood`."""
    least: float = 1.0
    """The smallest slowness that calm calls ever had."""
    seen_s: float = 0.0
    """When the last call ended, monotonic."""
    limit: int | None = None
    """Samples in a call at most."""
    best: dict[int, int] = field(default_factory=dict)
    """Samples that could share a call -> how many should, until the next observation."""

    def observe(self, size: int, seconds: float, now_s: float, is_calm: bool) -> None:
        """Learn from a call that ended at `now_s`."""
        self.best.clear()
        self.mood, self.seen_s = self.mood_at(now_s), now_s
        if size not in self.seconds:
            self.seconds[size] = seconds / self.mood.slowness
            return
        pace = seconds / self.seconds[size]
        change = 1 + SLOW_WEIGHT * (min(MAX_SURPRISE, pace / self.mood.slowness) - 1)
        self.mood = _learned(self.mood, pace)
        if is_calm:
            self.calm = _learned(self.calm, pace)
        self.seconds[size] *= change
        if size == min(self.seconds):  # only how sizes compare may change by load, not what a calm call takes
            self.calm = self.calm._replace(slowness=self.calm.slowness / change)
            self.least /= change
        self.calm = Mood(*map(min, self.calm, self.mood))
        self.least = min(self.least, self.calm.slowness)

    def mood_at(self, now_s: float) -> Mood:
        """The mood if no call is made until `now_s`. A clock that goes back takes nothing away."""
        smallest_s = self.seconds[min(self.seconds)] if self.seconds else 0.0
        half_life_s = max(HALF_LIFE_S, HALF_LIFE_CALLS * self.least * smallest_s)
        left = math.pow(0.5, (max(0.0, now_s - self.seen_s) / half_life_s) ** 2)
        slowness = self.calm.slowness * math.pow(self.mood.slowness / self.calm.slowness, left)
        return Mood(slowness, self.calm.deviation + left * (self.mood.deviation - self.calm.deviation))

    def usual(self, size: int) -> float:
        """Seconds at a `slowness` of 1; between sizes that were seen on the line, beyond them in proportion."""
        if size in self.seconds:
            return self.seconds[size]
        below = max((n for n in self.seconds if n < size), default=None)
        above = min((n for n in self.seconds if n > size), default=None)
        if above is None:
            assert below is not None
            return self.seconds[below] * size / below
        if below is None:
            return self.seconds[above]
        share = (size - below) / (above - below)
        return (1 - share) * self.seconds[below] + share * self.seconds[above]

    def batch_size(self, available: int) -> int:
        """The fewest samples that are about the most a second.

        Where a limit says that all sizes that may help were tried, only those are taken: a backend may run others in
        several calls. Before, a size that was never tried is expected to cost no more than the largest that was, so
        that it is.
        """
        at_most = min(available, self.limit or available)
        sizes = [size for size in sorted(self.seconds) if size <= at_most] if self.limit else range(1, at_most + 1)
        rates = {n: n / max(1e-9, self.usual(min(n, max(self.seconds)))) for n in sizes} or {at_most: 1.0}
        enough = max(rates.values()) * (1 - MIN_GAIN)
        return next(size for size, rate in rates.items() if rate >= enough)


def _learned(mood: Mood, pace: float) -> Mood:
    """The mood after a call that took `pace` times what its size takes."""
    surprise = min(MAX_SURPRISE, pace / mood.slowness) - 1
    slowness = mood.slowness * (1 + WEIGHT * surprise)
    return Mood(slowness, mood.deviation + WEIGHT * (abs(surprise) - mood.deviation))


class CostModel:
    """Seconds per kind of call and batch size, as of `now_s`. Not thread-safe: its owner locks.

    Kinds that were not seen cost nothing, which claims nothing: warm-up sees all of them.
    """

    def __init__(self) -> None:
        self._estimates: defaultdict[Kind, Estimate] = defaultdict(Estimate)
        self._now_s = 0.0
        self._moods: dict[Kind, Mood] = {}
        """As of `_now_s`: a forecast asks for them again and again."""

    def observe(self, kind: Kind, size: int, seconds: float, now_s: float, is_calm: bool = False) -> None:
        """Learn from one call, which ended at `now_s`.

        Args:
            is_calm: no other request was there or came meanwhile, so that it took what it takes without load.
        """
        self._estimates[kind].observe(size, seconds, now_s, is_calm)
        self.pass_time(now_s)

    def pass_time(self, now_s: float) -> None:
        """From here on, answer as of `now_s`: what was learned under load fades while no calls are made."""
        self._now_s = now_s
        self._moods = {}

    def at(self, now_s: float) -> CostModel:
        """The same costs as of another time, if no call is made until then."""
        other = copy.copy(self)
        other.pass_time(now_s)
        return other

    def least(self) -> CostModel:
        """The costs at their lowest: what calm calls took at best."""
        other = self.at(self._now_s)
        other._moods = {kind: Mood(estimate.least, 0.0) for kind, estimate in self._estimates.items()}
        return other

    def limit(self, kind: Kind, size: int) -> None:
        """Never again suggest more than `size` samples: they do not help, or do not fit into memory."""
        estimate = self._estimates[kind]
        estimate.limit = max(1, size)
        estimate.best.clear()

    def seconds(self, kind: Kind, size: int = 1) -> float:
        """What one call usually takes just now."""
        estimate = self._estimates.get(kind)
        if estimate is None or not estimate.seconds:
            return 0.0
        return estimate.usual(size) * self._mood(kind).slowness

    def deviation(self, kind: Kind) -> float:
        """Usual distance of a call from that, as a share of it."""
        return self._mood(kind).deviation if kind in self._estimates else 0.0

    def _mood(self, kind: Kind) -> Mood:
        if (mood := self._moods.get(kind)) is None:
            mood = self._moods[kind] = self._estimates[kind].mood_at(self._now_s)
        return mood

    def batch_size(self, kind: Kind, available: int) -> int:
        """How many of `available` samples should share a call: the fewest that are about the most a second."""
        estimate = self._estimates.get(kind)
        if estimate is None or not estimate.seconds:
            return available
        if available not in estimate.best:
            estimate.best[available] = estimate.batch_size(available)
        return estimate.best[available]
