"""Admission of samples, the choice of samples for the next call, and automatic step counts. No tensors.

A *promise* is a latency budget that was accepted: the deadline it sets must be met. Admission refuses a request that
would break a promise, its own or an earlier one. A promise that the machine breaks, because calls ran slower than
predicted, is given up: the picture still comes, and delays no other.

Order is earliest deadline first, between any two calls. A sample without a budget has a deadline too: its arrival plus
a multiple of its own unloaded time. So short samples overtake long ones, and a large picture blocks small ones for one
call at most. Nothing starves, because later arrivals come behind an expired deadline.

Laws (tests/tdm_runtime/scheduling/test_scheduler.py): every sample takes each of its calls exactly once; a batch never
exceeds its capacity or mixes lanes; the most urgent sample is always in it; while calls take their known time, every
deadline is met.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Generic, TypeVar

from tdm_runtime.errors import DeadlineError, InvalidRequestError, TDMError
from tdm_runtime.scheduling.cost_model import CostModel, Kind
from tdm_runtime.scheduling.demand import Demand, MovingRate
from tdm_runtime.scheduling.forecast import MARGIN, Forecast, call_seconds, choose, forecast
from tdm_runtime.scheduling.together import Together, leaves_room
from tdm_runtime.scheduling.work import NEVER_S, TOLERANCE_S, Urgency, Work

Item = TypeVar("Item", bound=Work)
DEMAND_WINDOW = 20
"""Window in which demand is counted, in unloaded times of a sample."""
MIN_WINDOW_S = 0.25
"""Shortest such window."""
TRIAL_S = 0.5
"""Time without a call after which an idle engine accepts a trial: a request expected late, but in time at best."""
TRIAL_TIMES = 10
"""The same in unloaded times of the request, used if that is longer than `TRIAL_S`."""
MIN_RETURN_S = 1e-3
"""Shortest time to retry that a refusal names."""
MAX_RETURN_S = 5.0
"""Upper bound on how far times to retry are spread. Earlier refused clients may never return."""
MAX_LOAD = 0.7
"""Load at which "auto" step counts stay at their smallest, as a share of the machine's time in its best batches. The
rest is for chance, smaller batches, and work outside the model."""


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _at_most(seconds: float) -> str:
    """Format an available time in ms, rounded down. So the printed numbers of a refusal add up."""
    return f"{math.floor(1e4 * max(0.0, seconds)) / 10:.1f}"


def _at_least(seconds: float) -> str:
    """Format a needed time in ms, rounded up."""
    return f"{math.ceil(1e4 * seconds) / 10:.1f}"


def _trial_pause_s(least_s: float) -> float:
    """Return the seconds from the last call to a trial. They keep the share of time spent on trials small."""
    return max(TRIAL_S, TRIAL_TIMES * least_s)


class StepScheduler(Generic[Item]):
    """Live samples and the choice among them. Not thread-safe; the owner holds the lock."""

    def __init__(self, costs: CostModel, capacity: int, joining: bool = True) -> None:
        """
        Args:
            costs: Costs of calls; the scheduler sets their time.
            capacity: Most samples in one call.
            joining: Whether samples may join between steps. False makes batches of whole requests, as other servers
                do; this is for benchmarks.
        """
        if capacity < 1:
            raise ValueError(f"capacity is {capacity}; a batch holds at least 1 sample")
        self.costs = costs
        self.capacity = capacity
        self.num_late = 0
        """Number of promises that were missed."""
        self._joining = joining
        self._running: list[Item] = []
        """Samples of the running call."""
        self._running_until_s = 0.0
        """Expected end of the running call, monotonic."""
        self._live: dict[Urgency, Item] = {}
        self._latest: set[int] = set()
        """Order numbers of the latest request's samples, accepted or refused."""
        self._arrived_s = 0.0
        """Arrival of that request, monotonic."""
        self._called_s = -NEVER_S
        """Start of the last call, monotonic."""
        self._busy = MovingRate()
        """Share of the time in which calls ran."""
        self._settled_demand = Demand()
        """Seconds of work a second, from requests with a fixed step count."""
        self._returns_s = 0.0
        """Time at which all refused requests are served if each retries at the time it was given, monotonic."""
        self._open_demand = Demand()
        """Samples a second, from requests with an "auto" step count."""
        self._together = Together(costs, capacity)
        self._is_grouped = False
        """Whether newcomers wait, in the present call, until all that have started are done."""

    def __len__(self) -> int:
        return len(self._live)

    def live(self) -> list[Item]:
        """Return all live samples, most urgent first."""
        return [self._live[urgency] for urgency in sorted(self._live)]

    @property
    def running_kind(self) -> Kind | None:
        """Kind of the running call, or None."""
        return self._running[0].call_kind if self._running else None

    def is_calm(self, since_s: float) -> bool:
        """Whether there was no load since then: no arrival, and live samples of the latest request only.

        Refused requests count as arrivals.
        """
        return self._arrived_s <= since_s and self._latest.issuperset(order for _, order in self._live)

    # -- admission ----------------------------------------------------------------------------

    def admit(self, items: Sequence[Item], now_s: float) -> None:
        """Accept all samples of a request, or none. They may share the very next call.

        Samples without a promise are always accepted, if necessary behind all promises. An idle engine keeps no
        reserve: its calls make no other promise late, and only calls can teach it that they deviate less by now.

        Raises:
            DeadlineError: A promise of these samples, or an earlier one, would be broken now.
            InvalidRequestError: The budget is too small even without load.
        """
        self.costs.pass_time(now_s, len(self._live) + len(items))
        self._latest, self._arrived_s = {item.urgency[1] for item in items}, now_s
        self._note_demand(items, now_s)
        margin = MARGIN if self._live else 0.0
        ahead = self._ahead(now_s, items, margin=margin)
        if ahead.broken is not None and self._joining and self._together.applies_to(self.live(), items):
            in_groups = self._ahead(now_s, items, margin=margin, together=True)
            ahead = in_groups if leaves_room(in_groups, [*self.live(), *items], now_s) else ahead
        if ahead.broken is not None and self._give_up_lost(now_s):
            ahead = self._ahead(now_s, items, margin=margin)
        if ahead.broken is not None:
            if all(item.promised_s == NEVER_S for item in items):
                self._step_aside(items)
            else:
                least_s = self._unloaded_s(items, self.costs.least())
                if not self._is_trial(items, now_s, least_s):
                    raise self._refusal(items, now_s, ahead, least_s)
        for item in items:
            assert item.urgency not in self._live, "urgency must be unique"
            self._live[item.urgency] = item
            self._together.arrived(item, now_s)

    def _is_trial(self, items: Sequence[Item], now_s: float, least_s: float) -> bool:
        """Whether samples are accepted as a trial: the engine was idle for a while, and at best they are in time.

        Calm calls too can teach costs that are too high, if another program keeps the machine busy. Those do not fade.

        Args:
            least_s: Seconds that the samples take at best, on an idle engine.
        """
        is_due = not self._live and now_s >= self._called_s + _trial_pause_s(least_s)
        return is_due and least_s <= min(item.promised_s - now_s + item.hand_over_s + item.encoding_s for item in items)

    def _step_aside(self, items: Sequence[Item]) -> None:
        """Put samples without a promise behind all promises. They share no call, so that they lengthen none."""
        behind_s = max(item.promised_s for item in self._live.values() if item.promised_s < NEVER_S)
        for item in items:
            item.urgency = (behind_s, item.urgency[1])
            item.share_no_call()

    def _note_demand(self, items: Sequence[Item], now_s: float) -> None:
        """Count requests as demand, refused ones too."""
        is_busy = bool(self._live)
        for item in items:
            if item.is_background:
                continue
            window_s = self._window_s(item)
            if item.open_steps:
                self._open_demand.add(1, is_busy, now_s, window_s)
            else:
                work_s = item.seconds_shared(self.costs, item.steps_left, self.capacity)
                self._settled_demand.add(work_s, is_busy, now_s, window_s)

    def _window_s(self, item: Item) -> float:
        """Return the window in which demand is counted, as seen from this sample."""
        return max(MIN_WINDOW_S, DEMAND_WINDOW * item.seconds_left(self.costs))

    def answered(self, item: Item, now_s: float) -> None:
        """Note that a sample was finished. Its client may ask again at once."""
        self._together.answered(item, now_s)

    def remove(self, item: Item) -> None:
        """Remove a finished, failed or cancelled sample."""
        del self._live[item.urgency]

    def backlog_s(self, deadline_s: float = NEVER_S) -> float:
        """Return the seconds of work that is due by a deadline, in batches of the best size."""
        due = [item for item in self._live.values() if item.urgency[0] <= deadline_s]
        return sum(
            item.seconds_left(self.costs, size) / size
            for item in due
            if (size := self.costs.batch_size(item.denoise.kind, min(len(due), self.capacity)))
        )

    def _refusal(self, items: Sequence[Item], now_s: float, ahead: Forecast, least_s: float) -> TDMError:
        """Return the error for a refused budget. It names the time to retry, or the smallest budget that works.

        Args:
            ahead: Forecast with these items, in which a promise is broken.
            least_s: Seconds that these items take at best, on an idle engine.
        """
        hardest = min(items, key=lambda item: item.promised_s)
        left_s, unloaded_s = hardest.promised_s - now_s, self._unloaded_s(items, self.costs)
        taken = (
            f"latency_budget_ms leaves {_at_most(left_s)} ms: {_at_least(hardest.elapsed_s)} ms have passed, "
            f"the hand-over takes {_at_least(hardest.hand_over_s)} ms and encoding {_at_least(hardest.encoding_s)} ms; "
            f"an idle engine needs {_at_least(unloaded_s)} ms for {_counted(len(items), 'picture')} of "
            f"{_counted(items[0].steps_left, 'step')}"
        )
        room_s = left_s + hardest.elapsed_s + hardest.hand_over_s + TOLERANCE_S
        if least_s > room_s:
            workable_s = unloaded_s + hardest.elapsed_s + hardest.hand_over_s + hardest.encoding_s
            return InvalidRequestError(
                f"{taken}; raise the budget to at least {_at_least(workable_s)} ms or request fewer steps",
                param="latency_budget_ms",
                code="latency_budget_too_small",
            )
        assert ahead.broken is not None
        done_s = ahead.finish_s[ahead.broken] - now_s
        spare = f"{_at_least(ahead.margin_s)} ms are reserved for slow calls"
        if ahead.broken in (item.urgency for item in items):
            reason = f"{_at_least(max(0.0, done_s - unloaded_s))} ms of work come first and {spare}"
        else:
            due_s = self._live[ahead.broken].promised_s - now_s
            reason = (
                f"a picture accepted earlier would be late: it is due in {_at_most(due_s)} ms, would be done in "
                f"{_at_least(done_s)} ms and {spare}"
            )
        wait_s = self._wait_s(items, now_s, unloaded_s, least_s, ahead.margin_s)
        return DeadlineError(
            f"{taken}; {reason}; retry later or raise the budget",
            retry_after_s=self._turn_s(items, now_s + wait_s) - now_s,
        )

    def _wait_s(self, items: Sequence[Item], now_s: float, unloaded_s: float, least_s: float, margin_s: float) -> float:
        """Return the seconds after which the refused budget is expected to fit, if no other request comes."""
        hardest = min(items, key=lambda item: item.promised_s)
        left_s = hardest.promised_s - now_s
        # Work that is due later counts too: it could become late.
        last_s = max(item.promised_s for item in [*items, *self._live.values()] if item.promised_s < NEVER_S)
        running_s = max(0.0, self._running_until_s - now_s) if self._running else 0.0
        idle_s = running_s + self.backlog_s(last_s)
        wait_s = max(MIN_RETURN_S, min(idle_s, idle_s + unloaded_s + margin_s - left_s))
        if unloaded_s > left_s:  # calls are too slow now, even for an idle engine
            last_call_s = now_s + running_s + self.backlog_s() if self._live else self._called_s
            wait_s = max(wait_s, last_call_s + _trial_pause_s(least_s) - now_s)
        return wait_s

    def _turn_s(self, items: Sequence[Item], earliest_s: float) -> float:
        """Return when a refused request may retry: each at its own time, as all at once would be refused again."""
        turn_s = min(max(earliest_s, self._returns_s), earliest_s + MAX_RETURN_S)
        self._returns_s = turn_s + sum(
            item.seconds_shared(self.costs, item.steps_left, self.capacity) for item in items
        )
        return turn_s

    def _unloaded_s(self, items: Sequence[Item], costs: CostModel) -> float:
        """Return the seconds that samples take on an idle engine."""
        works = [item.copy() for item in items]
        for work in works:
            work.promised_s = NEVER_S
        urgencies = {work.urgency for work in works}
        return max(forecast(works, costs, self.capacity, 0.0, urgencies).finish_s.values())

    # -- the next call ------------------------------------------------------------------------

    def schedule(self, now_s: float) -> list[Item]:
        """Return the samples of the next call, most urgent first; empty if none is live.

        For samples that take their first step it also fixes the step count and predicts the end.
        """
        self.costs.pass_time(now_s, len(self._live))
        self.end_call()
        self._give_up([item for item in self._live.values() if item.promised_s < now_s])
        self._is_grouped = len(self._live) > 1 and self._starts_together(now_s)
        batch = self._choice()
        while unsettled := [item for item in batch if item.open_steps and item.is_prepared]:
            for item in unsettled:
                item.settle(self._most_steps(item, now_s))
            batch = self._choice()
        if not batch:
            return []
        batch = self._tried(batch)
        if batch[0].is_prepared:
            self._predict([item for item in batch if not item.has_started], now_s)
        self._running = batch
        self.costs.began(now_s)
        self._called_s = now_s
        seconds = call_seconds(batch, self.costs)
        self._busy.add(seconds, now_s, self._window_s(batch[0]))
        self._running_until_s = now_s + seconds
        return batch

    def end_call(self) -> None:
        """Note that the call ended and that its samples advanced or left."""
        self._running = []
        self.costs.ended()

    def wait_s(self, now_s: float) -> float:
        """Return the seconds for which the next call should wait, see `Together.wait_s`."""
        return self._together.wait_s(self.live(), now_s) if self._joining else 0.0

    def _choice(self) -> list[Item]:
        if len(self._live) == 1:  # the usual case of a lone client: nothing to choose
            return [*self._live.values()]
        ordered = self._ready()
        return choose(ordered, self.costs, self.capacity) if ordered else []

    def _ready(self) -> list[Item]:
        """Return the samples that may take the next call, most urgent first."""
        ordered = self.live()
        return ([item for item in ordered if item.has_started] if self._is_grouped else []) or ordered

    def _starts_together(self, now_s: float) -> bool:
        """Whether newcomers wait until all that have started are done, now that no call runs."""
        if not self._joining:
            return True
        live = self.live()
        if not self._together.applies_to(live):
            return False
        return leaves_room(forecast(live, self.costs, self.capacity, now_s, together=True), live, now_s)

    def _tried(self, batch: list[Item]) -> list[Item]:
        """Return the batch, or a larger one if its size is due for a trial and nothing is promised."""
        if len(batch) == len(self._live) or not batch[0].is_prepared:
            return batch
        if any(item.promised_s < NEVER_S for item in self._live.values()):
            return batch
        lane = batch[0].lane
        mates = [item for item in self._ready() if item.lane == lane and item.is_prepared and not item.open_steps]
        size = self.costs.trial_size(lane.kind, min(self.capacity, len(mates)))
        return mates[:size] if size is not None and size > len(batch) else batch

    def _most_steps(self, item: Item, now_s: float) -> int:
        """Return the most steps with which a sample meets its target and breaks no promise, or else the fewest.

        A share of the time to the target stays free for requests to come, in proportion to the current load. The load
        is the share of the machine that recent requests take, if those of an "auto" step count take that many steps.
        """
        others = [other for other in self._live.values() if other is not item]
        window_s = self._window_s(item)
        busy = min(1.0, self._busy.per_second(now_s, window_s))
        settled = self._settled_demand.per_second(now_s, window_s, busy)
        rate = self._open_demand.per_second(now_s, window_s, busy, less=1)
        best = item.open_steps[0]
        for steps in item.open_steps[1:]:
            load = settled + rate * item.seconds_shared(self.costs, steps, self.capacity)
            tried = item.copy()
            tried.steps_left = steps
            seen = forecast([*others, tried], self.costs, self.capacity, now_s, {tried.urgency})
            free_s = min(1.0, load / MAX_LOAD) * (item.target_s - now_s)
            if seen.broken is not None or seen.finish_s[tried.urgency] > item.target_s - free_s:
                break
            best = steps
        return best

    def _predict(self, items: Sequence[Item], now_s: float) -> None:
        """Predict when samples finish."""
        if not items:
            return
        finish_s = self._ahead(now_s, watched={item.urgency for item in items}, together=self._is_grouped).finish_s
        for item in items:
            alone_s = now_s + item.seconds_left(self.costs)
            item.predicted_s = finish_s.get(item.urgency, alone_s)

    # -- promises -----------------------------------------------------------------------------

    def _ahead(
        self,
        now_s: float,
        added: Sequence[Work] = (),
        watched: Collection[Urgency] = (),
        margin: float = MARGIN,
        *,
        together: bool = False,
    ) -> Forecast:
        """Forecast the live samples and those added, from the end of the running call."""
        works: list[Work] = [*added]
        for item in self._live.values():
            work = item.copy()
            if item not in self._running or not work.advance():
                works.append(work)
        starts_s = max(now_s, self._running_until_s) if self._running else now_s
        return forecast(works, self.costs, self.capacity, starts_s, watched, margin, together=together)

    def _give_up_lost(self, now_s: float) -> bool:
        """Give up promises that are expected to be missed even without new samples: calls were slower than predicted.

        No reserve is asked for: promises may use up theirs.

        Returns:
            Whether a promise was given up.
        """
        before = self.num_late
        while (broken := self._ahead(now_s, margin=0.0).broken) is not None:
            self._give_up([self._live[broken]])
        return self.num_late > before

    def _give_up(self, items: Sequence[Item]) -> None:
        """Give promises up. The pictures still come, but do not make others late."""
        for item in items:
            self.num_late += 1
            del self._live[item.urgency]
            item.promised_s = NEVER_S
            item.urgency = (max(item.unpromised_s, item.urgency[0]), item.urgency[1])
            self._live[item.urgency] = item
