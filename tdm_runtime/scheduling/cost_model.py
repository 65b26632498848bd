"""Cost model: how long calls take. Warm-up and every call teach it; what load taught fades while the engine is idle.

It uses no tensors and has no clock: every time is an argument, monotonic.
"""

from __future__ import annotations

import copy
import math
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple

WEIGHT = 0.1
"""EMA weight of the latest call in the machine's speed."""
SLOW_WEIGHT = 0.02
"""EMA weight of the latest call in the relative cost of its batch size, once many calls of that size were made."""
WARM_UP_CALLS = 10
"""Calls that the measurement of a batch size at warm-up counts for: the n-th call after it weighs 1 / (n + this)."""
TRIAL_CALLS = 50
"""Calls of a kind after which the next larger batch size is tried again."""
TRIAL_LOSS = 0.2
"""Share of the throughput that a trial may cost by what is known of its size."""
MAX_SURPRISE = 4.0
"""Cap on the duration of a call, as a multiple of the expected one. A stall of the machine is no cost of the model."""
CROWD = 8
"""Samples present from which on the speed is remembered by their number. It does not fade: so many requests keep the
processor busy beside the calls, each time they come."""
MIN_GAIN = 0.03
"""Share by which throughput must rise for a batch to grow."""
HALF_LIFE_S = 0.25
"""Idle time after which half of what load taught about a kind of call is forgotten.

The remaining part is 0.5^(t / half-life)^2. After a second it is 0.002 %, so a client that comes a second after a burst
finds no trace of it."""
AWAY_HALF_LIFE_S = 10.0
"""The same for the time since a call of the kind while the engine makes other calls. Under load that time is no sign of
less load: a large batch takes long, and the calls of other kinds come in between."""
HALF_LIFE_CALLS = 20
"""Both half-lives in calls, used where that is longer. Slow calls are far apart under load too."""


class Kind(NamedTuple):
    """Kind of call: calls of one kind cost the same at the same batch size."""

    stage: str
    """Stage of the call: text, denoise, decode:full, decode:tiny, encode:png, ..."""
    shape: tuple[int, ...] = ()
    """Shape of one sample's latents, [C, H, W] or [C, F, H, W]; empty if the cost does not depend on it."""
    model: str = ""
    """Name of the model whose programs run the call; empty for calls outside a model."""


class Mood(NamedTuple):
    """Speed of the machine for one kind of call at one time, whatever the batch size."""

    slowness: float
    """Factor on `Estimate.seconds`."""
    deviation: float
    """Mean absolute deviation of calls from their expected duration, as a share of it."""


class Clock(NamedTuple):
    """A time, and how long the engine has been idle up to it."""

    now_s: float
    """Monotonic."""
    idle_s: float


@dataclass
class Estimate:
    """Estimate for one kind of call: the relative cost of its batch sizes, and the present speed of the machine.

    The two are kept apart because the speed of a machine changes. A size that happened to run in a slow minute would
    otherwise look bad, would not be used, and would never be seen to be good.

    Load changes the speed too. What calls under load teach fades to what calm calls taught.
    """

    seconds: dict[int, float] = field(default_factory=dict)
    """Batch size -> seconds at a `slowness` of 1."""
    mood: Mood = Mood(1.0, 0.0)
    """Speed after the last call."""
    calm: Mood = Mood(1.0, 0.0)
    """Speed that calm calls taught; never above `mood`."""
    least: float = 1.0
    """Smallest slowness that `calm` ever had."""
    crowded: dict[int, Mood] = field(default_factory=dict)
    """Bits of the number of samples present -> speed after the last call beside so many."""
    seen: Clock = Clock(0.0, 0.0)
    """End of the last call."""
    limit: int | None = None
    """Most samples in a call; None: not known yet."""
    best: dict[int, int] = field(default_factory=dict)
    """Cache: samples that could share a call -> samples that should. Cleared by the next observation."""
    counts: Counter[int] = field(default_factory=Counter)
    """Batch size -> calls made with it, the measurement at warm-up included."""
    latest: dict[int, int] = field(default_factory=dict)
    """Batch size -> number of the latest call made with it."""

    def observe(self, size: int, seconds: float, clock: Clock, present: int, is_calm: bool) -> None:
        """Learn from a call that ended at `clock`, while so many samples were present."""
        self.best.clear()
        self.mood, self.seen = self.mood_at(clock, present), clock
        self.counts[size] += 1
        self.latest[size] = self.counts.total()
        if size not in self.seconds:
            self.seconds[size] = seconds / self.mood.slowness
            return
        pace = seconds / self.seconds[size]
        weight = max(SLOW_WEIGHT, 1 / (self.counts[size] + WARM_UP_CALLS))
        change = 1 + weight * (min(MAX_SURPRISE, pace / self.mood.slowness) - 1)
        self.mood = _learned(self.mood, pace)
        if present >= CROWD:
            self.crowded[present.bit_length()] = self.mood
        if is_calm:
            self.calm = _learned(self.calm, pace)
        self.seconds[size] *= change
        if size == min(self.seconds):  # load may change how sizes compare, but not the duration of a calm call
            self.calm = self.calm._replace(slowness=self.calm.slowness / change)
            self.least /= change
        self.calm = Mood(*map(min, self.calm, self.mood))
        self.least = min(self.least, self.calm.slowness)

    def mood_at(self, clock: Clock, present: int) -> Mood:
        """Return the mood at `clock` beside so many samples, if no call of this kind is made until then.

        A clock may go back.
        """
        calls_s = HALF_LIFE_CALLS * self.least * self.seconds[min(self.seconds)] if self.seconds else 0.0
        idle = max(0.0, clock.idle_s - self.seen.idle_s) / max(HALF_LIFE_S, calls_s)
        away = max(0.0, clock.now_s - self.seen.now_s) / max(AWAY_HALF_LIFE_S, calls_s)
        left = math.pow(0.5, idle**2 + away**2)
        slowness = self.calm.slowness * math.pow(self.mood.slowness / self.calm.slowness, left)
        faded = Mood(slowness, self.calm.deviation + left * (self.mood.deviation - self.calm.deviation))
        known = [level for level in self.crowded if level <= present.bit_length()]
        return Mood(*map(max, faded, self.crowded[max(known)])) if known and present >= CROWD else faded

    def usual(self, size: int) -> float:
        """Return the seconds at a `slowness` of 1.

        Between measured sizes it interpolates; above them it grows in proportion to `size`.
        """
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
        """Return the fewest samples that reach about the highest throughput.

        With a limit, all sizes that may help were measured, and only measured sizes are taken: a backend may run other
        sizes in several calls. Without a limit, a size above the largest measured one is assumed to cost as much as
        that, so that it is tried.
        """
        rates = self._rates(available)
        enough = max(rates.values()) * (1 - MIN_GAIN)
        return next(size for size, rate in rates.items() if rate >= enough)

    def trial_size(self, available: int) -> int | None:
        """Return the next larger size if it is due for a trial, or None.

        A size that was measured in a slow moment would otherwise not be used, and never be seen to be good.
        """
        rates, size = self._rates(available), self.batch_size(available)
        larger = min((n for n in rates if n > size), default=None)
        if larger is None or rates[larger] < (1 - TRIAL_LOSS) * rates[size]:
            return None
        return larger if self.counts.total() - self.latest.get(larger, 0) >= TRIAL_CALLS else None

    def _rates(self, available: int) -> dict[int, float]:
        """Return samples a second of the sizes that may be taken, ascending."""
        at_most = min(available, self.limit or available)
        sizes = [size for size in sorted(self.seconds) if size <= at_most] if self.limit else range(1, at_most + 1)
        return {n: n / max(1e-9, self.usual(min(n, max(self.seconds)))) for n in sizes} or {at_most: 1.0}


def _learned(mood: Mood, pace: float) -> Mood:
    """Return the mood after a call that took `pace` times the `seconds` of its size."""
    surprise = min(MAX_SURPRISE, pace / mood.slowness) - 1
    slowness = mood.slowness * (1 + WEIGHT * surprise)
    return Mood(slowness, mood.deviation + WEIGHT * (abs(surprise) - mood.deviation))


def _growth(measured: Kind, kind: Kind) -> float:
    """Return the cost of a size as a multiple of the cost of a measured one, estimated from the sizes of their latents.

    The estimate is high on purpose: a larger size pays for attention too, which grows with its square, and a smaller
    one keeps its fixed costs.
    """
    if measured == kind:
        return 1.0
    ratio = math.prod(kind.shape) / math.prod(measured.shape)
    return float(ratio**1.5 if ratio > 1 else ratio**0.5)


class CostModel:
    """Seconds of a call by kind and batch size. Not thread-safe; the owner holds the lock.

    Warm-up measures every stage of a model at its native sizes. A size that was never measured takes its cost from the
    measured size that is nearest (`_nearest`); a stage that was never measured costs nothing.
    """

    def __init__(self) -> None:
        self._estimates: defaultdict[Kind, Estimate] = defaultdict(Estimate)
        self._now_s = 0.0
        self._present = 0
        """Samples present at that time."""
        self._busy_until = Clock(0.0, 0.0)
        """Latest time at which a call ended or began."""
        self._is_running = False
        """Whether a call runs."""
        self._moods: dict[Kind, Mood] = {}
        """Cache of the moods at `_now_s`; a forecast reads them often."""

    def began(self, now_s: float) -> None:
        """Note that the engine began a call."""
        self._busy_until, self._is_running = self._clock_at(now_s), True

    def ended(self) -> None:
        """Note that the engine's call ended. Its duration is observed next."""
        self._is_running = False

    def observe(self, kind: Kind, size: int, seconds: float, now_s: float, is_calm: bool = False) -> None:
        """Learn from one call, which ended at `now_s`.

        Args:
            is_calm: Whether no other request was present or arrived during the call.
        """
        began = self._clock_at(now_s - seconds)
        self._busy_until = Clock(max(now_s, self._busy_until.now_s), began.idle_s)
        self._estimates[kind].observe(size, seconds, self._busy_until, self._present, is_calm)
        self.pass_time(now_s, self._present)

    def _clock_at(self, now_s: float) -> Clock:
        """Return the time, and how long the engine has been idle if it made no other call until then."""
        idle_s = 0.0 if self._is_running else max(0.0, now_s - self._busy_until.now_s)
        return Clock(now_s, self._busy_until.idle_s + idle_s)

    def pass_time(self, now_s: float, present: int = 1) -> None:
        """Set the time to `now_s`. What load taught fades with it.

        Args:
            present: Samples accepted and not finished, with those that are about to be accepted.
        """
        self._now_s, self._present = now_s, present
        self._moods = {}

    def at(self, now_s: float) -> CostModel:
        """Return these costs at another time, if no call is made until then."""
        other = copy.copy(self)
        other.pass_time(now_s, self._present)
        return other

    def least(self) -> CostModel:
        """Return the lowest costs: the best that calm calls reached."""
        other = self.at(self._now_s)
        other._moods = {kind: Mood(estimate.least, 0.0) for kind, estimate in self._estimates.items()}
        return other

    def limit(self, kind: Kind, size: int) -> None:
        """Never suggest more than `size` samples again: more do not help, or do not fit into memory."""
        estimate = self._estimates[kind]
        estimate.limit = max(1, size)
        estimate.best.clear()

    def seconds(self, kind: Kind, size: int = 1) -> float:
        """Return the expected seconds of one call."""
        measured = self._nearest(kind)
        if measured is None:
            return 0.0
        return self._estimates[measured].usual(size) * self._mood(measured).slowness * _growth(measured, kind)

    def deviation(self, kind: Kind) -> float:
        """Return the mean absolute deviation of calls from `seconds`, as a share of it."""
        measured = self._nearest(kind)
        return 0.0 if measured is None else self._mood(measured).deviation

    def _nearest(self, kind: Kind) -> Kind | None:
        """Return the kind, or the measured kind of the same stage and model whose latents are nearest in size."""
        if (estimate := self._estimates.get(kind)) is not None and estimate.seconds:
            return kind
        if not kind.shape:
            return None
        known = (other for other in self._measured if other[::2] == kind[::2] and len(other.shape) == len(kind.shape))
        return min(known, key=lambda other: abs(math.log(_growth(other, kind))), default=None)

    @property
    def _measured(self) -> list[Kind]:
        return [kind for kind, estimate in self._estimates.items() if estimate.seconds]

    def _mood(self, kind: Kind) -> Mood:
        if (mood := self._moods.get(kind)) is None:
            mood = self._moods[kind] = self._estimates[kind].mood_at(self._clock_at(self._now_s), self._present)
        return mood

    def batch_size(self, kind: Kind, available: int) -> int:
        """Return how many of `available` samples should share a call, the fewest at about the highest throughput."""
        if available <= 1 or (measured := self._nearest(kind)) is None:
            return available
        estimate = self._estimates[measured]
        if available not in estimate.best:
            estimate.best[available] = estimate.batch_size(available)
        return estimate.best[available]

    def trial_size(self, kind: Kind, available: int) -> int | None:
        """Return a larger size that is due for a trial, or None. Sizes that were never measured are not tried."""
        estimate = self._estimates.get(kind)
        return estimate.trial_size(available) if estimate is not None and estimate.seconds else None
