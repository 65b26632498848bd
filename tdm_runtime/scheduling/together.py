"""Samples that travel together, because they are alike. No tensors.

Samples that start together share all their calls; samples that overlap by chance share some of their steps. For clients
that ask again as soon as they are answered the next call may wait.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from tdm_runtime.scheduling.cost_model import MIN_GAIN, CostModel
from tdm_runtime.scheduling.forecast import Forecast
from tdm_runtime.scheduling.work import NEVER_S, Lane, Work

RETURN_WEIGHT = 0.1
"""EMA weight of the latest answer in what is known of clients that return."""
MOST_RETURN = 0.8
"""Share of answers that a new request follows soon, from which on clients count as returning."""
RETURN_DEVIATIONS = 3.0
"""Mean absolute deviations after the mean delay until which a client is expected back."""

RETURN_WINDOW = 0.5
"""Time in which an answered client counts as returning, in unloaded times of a sample."""
ALIKE = 8
"""Requests of one lane and step count in a row after which samples travel together."""
MOST_GROUPED = 0.5
"""Share of the time to a promise in which a sample must be done, so that newcomers wait and start together. The rest
is for requests to come, which lengthen the next group."""


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


def _like(item: Work) -> tuple[Lane, int]:
    """Return what alike samples have in common, before their first step."""
    return item.denoise, len(item.open_steps) or item.steps_left


def leaves_room(ahead: Forecast, items: Sequence[Work], now_s: float) -> bool:
    """Whether groups that start together, as forecast, would keep all promises and leave room for requests to come."""
    return ahead.broken is None and all(
        ahead.finish_s.get(item.urgency, now_s) - now_s <= MOST_GROUPED * (item.promised_s - now_s)
        for item in items
        if item.promised_s < NEVER_S
    )


class Together:
    """Whether newcomers wait until all that have started are done, and the next call for clients that return."""

    def __init__(self, costs: CostModel, capacity: int) -> None:
        """
        Args:
            costs: Costs of calls.
            capacity: Most samples in one call.
        """
        self._costs = costs
        self._capacity = capacity
        self._returns = Returns()
        self._latest_like: tuple[Lane, int] | None = None
        """Lane and step count of the latest accepted sample."""
        self._num_alike = 0
        """Number of samples in a row with that lane and step count."""

    def arrived(self, item: Work, now_s: float) -> None:
        """Note an accepted sample: it may be of a client that was just answered, and it may be like the one before."""
        if item.is_background:
            return
        self._returns.arrived(now_s, RETURN_WINDOW * item.seconds_left(self._costs))
        self._num_alike = self._num_alike + 1 if _like(item) == self._latest_like else 1
        self._latest_like = _like(item)

    def answered(self, item: Work, now_s: float) -> None:
        """Note that a sample was finished."""
        if not item.is_background:
            self._returns.answered(now_s)

    def applies_to(self, live: Sequence[Work], arriving: Sequence[Work] = ()) -> bool:
        """Whether newcomers should wait until all that have started are done, if no promise forbids it.

        Alike samples that start together share every call. Those that join between steps share only their steps: each
        arrival adds a text call and a decode, which delay all others. If requests differ, samples join between steps,
        because a group would last as long as its longest member.

        Args:
            live: Live samples.
            arriving: Samples that were not accepted yet.
        """
        if self._num_alike < ALIKE or any(_like(item) != self._latest_like for item in arriving):
            return False
        return not any(item.open_steps or item.is_background for item in [*live, *arriving])

    def wait_s(self, live: Sequence[Work], now_s: float) -> float:
        """Return the seconds for which the next call should wait, because clients are about to return.

        Samples that start together make fewer calls than two groups of them. The wait is worth it if it takes less time
        than those calls. It is 0 if two equal groups cost hardly more than one, because they alternate and the engine
        never pauses; beside a promise; and for a client that is alone.

        Args:
            live: At least one sample, most urgent first.
        """
        if not self._returns.are_usual or not self.applies_to(live):
            return 0.0
        if any(item.has_started or item.promised_s < NEVER_S for item in live):
            return 0.0
        first, here = live[0], len(live)
        expected, wait_s = self._returns.expected(now_s, RETURN_WINDOW * first.seconds_left(self._costs))
        everyone, half = here + expected, (here + expected) // 2
        if not expected or everyone > self._capacity:
            return 0.0
        all_s = self._group_s(first, everyone)
        if wait_s > self._group_s(first, here) + self._group_s(first, expected) - all_s:
            return 0.0
        halves_s = self._group_s(first, half) + self._group_s(first, everyone - half)
        return max(0.0, wait_s) if here < half or halves_s > (1 + MIN_GAIN) * all_s else 0.0

    def _group_s(self, item: Work, size: int) -> float:
        """Return the seconds of the steps and decodes of `size` samples that start together."""
        calls = ((item.denoise.kind, item.steps_left), (item.decode.kind, item.decodes_left))
        return sum(number * self._costs.seconds(kind, size) for kind, number in calls)
