"""Requests and their arrival times. All are drawn from one seed, so that every contender gets the same."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Steps = int | Literal["auto"] | None
"""Step count, "auto" for the server's choice, or None to leave the field out."""
Size = tuple[int, int]
"""(width, height) in pixels."""
GIVEN_SIZE: Size = (64, 64)
"""Size of a given picture whose request names no size."""

SUBJECTS = ("red heart", "cat", "rocket", "pizza", "penguin", "butterfly", "tree", "guitar")
BACKGROUNDS = ("white", "black", "gray", "red", "orange", "yellow", "green", "blue", "purple", "pink")
MAX_SEED = 2**32 - 1
ARRIVALS, REQUESTS = 0, 1
"""Separate random streams, so that the schedule stays the same when the requests change."""


@dataclass(frozen=True)
class Request:
    """Request for one picture."""

    prompt: str
    seed: int
    num_inference_steps: Steps = None
    size: Size | None = None
    latency_budget_ms: float | None = None
    min_inference_steps: int | None = None
    strength: float | None = None
    """Strength of an edit of `given_pixels`; None starts from noise."""

    def given_pixels(self) -> NDArray[np.uint8]:
        """Return the picture that an edit changes, uint8 [H, W, 3]: noise of its seed, so that none occurs twice."""
        width, height = self.size or GIVEN_SIZE
        return np.random.default_rng(self.seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@dataclass(frozen=True)
class Workload:
    """Endless sequence of requests; the same fields give the same sequence.

    Raises:
        ValueError: `steps` or `sizes` is empty, or the seed is negative.
    """

    seed: int = 0
    steps: tuple[Steps, ...] = (None,)
    """Each request draws one of these with equal probability."""
    sizes: tuple[Size | None, ...] = (None,)
    """Each request draws one of these with equal probability."""
    latency_budget_ms: float | None = None
    min_inference_steps: int | None = None
    strength: float | None = None
    """Strength of edits; None makes pictures from noise."""
    tag: str = ""
    """Word added to every prompt; a fresh tag makes sure that no text cache is hit."""

    def __post_init__(self) -> None:
        if not self.steps or not self.sizes:
            raise ValueError("steps and sizes must each have at least one value")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must be at least 0")

    def requests(self) -> Iterator[Request]:
        """Yield the requests; no prompt occurs twice."""
        generator = np.random.default_rng([self.seed, REQUESTS])
        for number in itertools.count():
            # Draw every value even if it is not needed, so that another mixture gets the same seeds.
            seed = int(generator.integers(MAX_SEED + 1))
            steps = self.steps[int(generator.random() * len(self.steps))]
            size = self.sizes[int(generator.random() * len(self.sizes))]
            limits = self.latency_budget_ms, self.min_inference_steps, self.strength
            yield Request(self._prompt(number), seed, steps, size, *limits)

    def _prompt(self, number: int) -> str:
        subject = SUBJECTS[number % len(SUBJECTS)]
        background = BACKGROUNDS[number // len(SUBJECTS) % len(BACKGROUNDS)]
        return " ".join(f"a {subject} on {background}, number {number} {self.tag}".split())


def arrival_times(count: int, request_rate: float, burstiness: float = 1.0, seed: int = 0) -> list[float]:
    """Return the arrival times of requests, in seconds since the start, in rising order.

    The gaps are drawn from a gamma distribution with mean 1 / request_rate and shape `burstiness`: 1 is a
    Poisson process, below 1 arrivals come in bursts, above 1 they are more regular. A rate of infinity puts
    every arrival at 0.

    Raises:
        ValueError: the rate or the burstiness is not positive.
    """
    _check_arrivals(request_rate, burstiness)
    if math.isinf(request_rate):
        return [0.0] * count
    gaps = np.random.default_rng([seed, ARRIVALS]).gamma(burstiness, 1.0 / (request_rate * burstiness), count)
    times: list[float] = np.cumsum(gaps).tolist()
    return times


def arrivals_within(duration_s: float, request_rate: float, burstiness: float = 1.0, seed: int = 0) -> list[float]:
    """Return the arrivals of `arrival_times` up to `duration_s`.

    Raises:
        ValueError: as `arrival_times`, or the rate is infinite.
    """
    _check_arrivals(request_rate, burstiness)
    if math.isinf(request_rate):
        raise ValueError("a request rate of inf needs a number of requests, not a duration")
    count = 16
    while (times := arrival_times(count, request_rate, burstiness, seed))[-1] <= duration_s:
        count *= 2
    return [time_s for time_s in times if time_s <= duration_s]


def _check_arrivals(request_rate: float, burstiness: float) -> None:
    if not request_rate > 0:
        raise ValueError(f"the request rate is {request_rate:g}; it must be above 0, or inf for all at once")
    if not 0 < burstiness < math.inf:
        raise ValueError(f"burstiness is {burstiness:g}; it must be above 0 (1 = Poisson, below 1 = bursts)")
