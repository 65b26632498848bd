"""How long calls take: learned at warm-up, kept current by every call. Knows no tensors."""

from __future__ import annotations

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


class Kind(NamedTuple):
    """Calls that cost the same at the same batch size."""

    stage: str
    """text, denoise, decode:full, decode:tiny, encode:png, ..."""
    shape: tuple[int, ...] = ()
    """Shape of one sample's latents, [C, H, W] or [C, F, H, W]; empty where it does not matter."""
    model: str = ""
    """Whose programs run it, where there are several models."""


@dataclass
class Estimate:
    """One kind of call: how its sizes compare, and how fast the machine is just now.

    The two are told apart because a machine has moods. A size that happened to run in a slow minute would
    otherwise look bad, not be used, and so never be seen to be good.
    """

    seconds: dict[int, float] = field(default_factory=dict)
    """Batch size -> seconds at a `slowness` of 1."""
    slowness: float = 1.0
    deviation: float = 0.0
    """Usual distance of a call from what was expected, as a share of it."""
    limit: int | None = None
    """Samples in a call at most."""
    best: dict[int, int] = field(default_factory=dict)
    """Samples that could share a call -> how many should, until the next observation."""

    def observe(self, size: int, seconds: float) -> None:
        self.best.clear()
        if size not in self.seconds:
            self.seconds[size] = seconds / self.slowness
            return
        expected_s = self.slowness * self.seconds[size]
        surprise = min(MAX_SURPRISE, seconds / expected_s)
        self.deviation += WEIGHT * (abs(surprise - 1) - self.deviation)
        self.slowness *= 1 + WEIGHT * (surprise - 1)
        self.seconds[size] *= 1 + SLOW_WEIGHT * (surprise - 1)

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


class CostModel:
    """Seconds per kind of call and batch size. Not thread-safe: its owner locks.

    Kinds that were not seen cost nothing, which claims nothing: warm-up sees all of them.
    """

    def __init__(self) -> None:
        self._estimates: defaultdict[Kind, Estimate] = defaultdict(Estimate)

    def observe(self, kind: Kind, size: int, seconds: float) -> None:
        """Learn from one call."""
        self._estimates[kind].observe(size, seconds)

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
        return estimate.usual(size) * estimate.slowness

    def deviation(self, kind: Kind) -> float:
        """Usual distance of a call from that, as a share of it."""
        estimate = self._estimates.get(kind)
        return 0.0 if estimate is None else estimate.deviation

    def batch_size(self, kind: Kind, available: int) -> int:
        """How many of `available` samples should share a call: the fewest that are about the most a second."""
        estimate = self._estimates.get(kind)
        if estimate is None or not estimate.seconds:
            return available
        if available not in estimate.best:
            estimate.best[available] = estimate.batch_size(available)
        return estimate.best[available]
