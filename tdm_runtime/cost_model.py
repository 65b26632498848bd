"""How long calls take: learned at warm-up, kept current by every call. Knows no tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

WEIGHT = 0.1
"""Of the latest call in a moving average."""
MAX_SURPRISE = 4.0
"""A call counts as at most so many times what was expected: a stall of the machine is not the model's cost."""
MIN_GAIN = 0.05
"""A batch grows only where more pictures a second come of it, by at least this share."""


class Kind(NamedTuple):
    """Calls that cost the same at the same batch size."""

    stage: str
    """text, denoise, decode:full, decode:tiny, encode:png, ..."""
    shape: tuple[int, ...] = ()
    """Of one sample's latents, [C, H, W], where it matters."""


@dataclass
class Estimate:
    """Moving averages of one kind at one batch size, in seconds."""

    mean_s: float
    deviation_s: float = 0.0
    """Of the distance to the mean."""

    @property
    def cautious_s(self) -> float:
        """What a promise counts on."""
        return self.mean_s + self.deviation_s

    def observe(self, seconds: float) -> None:
        seconds = min(seconds, MAX_SURPRISE * self.mean_s)
        self.deviation_s += WEIGHT * (abs(seconds - self.mean_s) - self.deviation_s)
        self.mean_s += WEIGHT * (seconds - self.mean_s)


class CostModel:
    """Seconds per kind of call and batch size. Not thread-safe: its owner locks.

    Sizes that were not seen lie on the line between those that were; kinds that were not seen cost
    nothing, which claims nothing: warm-up sees all of them.
    """

    def __init__(self) -> None:
        self._estimates: dict[Kind, dict[int, Estimate]] = {}
        self._best: dict[Kind, dict[int, int]] = {}
        """Samples that could share a call -> how many should, until the next observation."""
        self._limits: dict[Kind, int] = {}

    def observe(self, kind: Kind, size: int, seconds: float) -> None:
        """Learn from one call."""
        known = self._estimates.setdefault(kind, {})
        if size in known:
            known[size].observe(seconds)
        else:
            known[size] = Estimate(seconds)
        self._best.pop(kind, None)

    def limit(self, kind: Kind, size: int) -> None:
        """Never again suggest more than `size` samples: they do not help, or do not fit into memory."""
        self._limits[kind] = max(1, size)
        self._best.pop(kind, None)

    def seconds(self, kind: Kind, size: int = 1) -> float:
        """What a promise counts on for one call: the mean and its usual deviation."""
        known = self._estimates.get(kind)
        if not known:
            return 0.0
        if size in known:
            return known[size].cautious_s
        below = max((n for n in known if n < size), default=None)
        above = min((n for n in known if n > size), default=None)
        if above is None:
            assert below is not None
            return known[below].cautious_s * size / below
        if below is None:
            return known[above].cautious_s
        share = (size - below) / (above - below)
        return (1 - share) * known[below].cautious_s + share * known[above].cautious_s

    def batch_size(self, kind: Kind, available: int) -> int:
        """How many of `available` samples should share a call: the fewest that are about the most a second."""
        best = self._best.setdefault(kind, {})
        if available not in best:
            best[available] = self._most_a_second(kind, available)
        return best[available]

    def _most_a_second(self, kind: Kind, available: int) -> int:
        available = min(available, self._limits.get(kind, available))
        known = self._estimates.get(kind)
        if not known:
            return available
        # A size that was never tried is expected to cost no more than the largest that was: so it is tried.
        rates = {n: n / max(1e-9, self.seconds(kind, min(n, max(known)))) for n in range(1, available + 1)}
        enough = max(rates.values()) * (1 - MIN_GAIN)
        return next(size for size, rate in rates.items() if rate >= enough)
