"""Which samples share the next call, who is let in, and with how many steps. Knows no tensors.

Earliest deadline first, between any two calls. A sample without a budget has a deadline too, some
multiple of its own unloaded time after its arrival: so what is short overtakes what is long, a large
picture never blocks small ones for more than a call, and nothing starves, since what arrives after a
sample's deadline comes behind it.

Laws (tests/tdm_runtime/scheduling/test_scheduler.py): every sample takes each of its calls exactly once, a
batch never exceeds its capacity or mixes lanes, the most urgent sample is always in it, and while
calls take what they are known to take, every promise is kept.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Generic, TypeVar

from tdm_runtime.errors import DeadlineError, InvalidRequestError, TDMError
from tdm_runtime.scheduling.cost_model import CostModel, Kind
from tdm_runtime.scheduling.demand import MovingRate
from tdm_runtime.scheduling.forecast import MARGIN, Forecast, call_seconds, choose, forecast
from tdm_runtime.scheduling.work import NEVER_S, TOLERANCE_S, Urgency, Work

Item = TypeVar("Item", bound=Work)
DEMAND_WINDOW = 20
"""Unloaded times of a sample in which demand is counted."""
MIN_WINDOW_S = 0.25
TRIAL_S = 0.5
"""Time without a call after which an idle engine lets in what it expects to be late and at best is in time."""
TRIAL_TIMES = 10
"""The same in unloaded times of what is let in, where that is longer."""
MIN_RETURN_S = 1e-3
"""Shortest time after which a refused request may come back."""
MAX_RETURN_S = 5.0
"""Who is refused is not sent away for longer because others were, who may not come back."""
MAX_LOAD = 0.7
"""Share of the machine's time, in its best batches, at which open step counts stay at their smallest: chance, batches
that are not the best, and what is not the model's, need the rest."""


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _at_most(seconds: float) -> str:
    """Milliseconds that there are, rounded down: so the numbers of a refusal add up to it as they are printed."""
    return f"{math.floor(1e4 * max(0.0, seconds)) / 10:.1f}"


def _at_least(seconds: float) -> str:
    """Milliseconds that are needed, rounded up."""
    return f"{math.ceil(1e4 * seconds) / 10:.1f}"


class StepScheduler(Generic[Item]):
    """The live samples and the choice among them. Not thread-safe: its owner locks."""

    def __init__(self, costs: CostModel, capacity: int, joining: bool = True) -> None:
        """
        Args:
            capacity: samples in one call at most.
            joining: False lets no sample join before all that started together are done: batches of whole
                requests, as other servers make them, to compare with.
        """
        if capacity < 1:
            raise ValueError(f"capacity is {capacity}; a batch holds at least 1 sample")
        self.costs = costs
        self.capacity = capacity
        self.num_late = 0
        """Promises that were not kept."""
        self._joining = joining
        self._together: set[Item] = set()
        """Those that started together, where none may join."""
        self._running: list[Item] = []
        self._running_until_s = 0.0
        """When the running call is expected to end, monotonic."""
        self._live: dict[Urgency, Item] = {}
        self._latest: set[int] = set()
        """Those that came last, refused or not, by their order of arrival."""
        self._arrived_s = 0.0
        """When they came, monotonic."""
        self._called_s = -NEVER_S
        """When the last call began, monotonic."""
        self._settled_demand = MovingRate()
        """Seconds of work a second, of step counts that were asked for."""
        self._returns_s = 0.0
        """When all who were refused will have been served, if they come back when they were told to, monotonic."""
        self._open_demand = MovingRate()
        """Samples a second whose step count was left open."""

    def __len__(self) -> int:
        return len(self._live)

    def live(self) -> list[Item]:
        """All samples, most urgent first."""
        return [self._live[urgency] for urgency in sorted(self._live)]

    @property
    def running_kind(self) -> Kind | None:
        """Of the call that runs."""
        return self._running[0].lane.kind if self._running else None

    def is_calm(self, since_s: float) -> bool:
        """Whether there was no load since then: one request's samples at most, and no arrival, refused ones too."""
        return self._arrived_s <= since_s and self._latest.issuperset(order for _, order in self._live)

    # -- who is let in ------------------------------------------------------------------------

    def admit(self, items: Sequence[Item], now_s: float) -> None:
        """Let samples join, which may share the very next call, if that breaks no promise; all of them or none.

        Those without a promise are let in in any case, if need be behind all promises. An idle engine keeps no time to
        spare: its calls make no other promise late, and only calls teach it that their kind deviates less by now.

        Raises:
            DeadlineError: a promise of theirs, or another's because of them, could not be kept now.
            InvalidRequestError: theirs could not be kept with nothing else to do.
        """
        self.costs.pass_time(now_s)
        self._latest, self._arrived_s = {item.urgency[1] for item in items}, now_s
        self._note_demand(items, now_s)
        margin = MARGIN if self._live else 0.0
        ahead = self._ahead(now_s, items, margin=margin)
        if ahead.broken is not None and self._give_up_lost(now_s):
            ahead = self._ahead(now_s, items, margin=margin)
        if ahead.broken is not None and not self._is_trial(items, now_s):
            if any(item.promised_s < NEVER_S for item in items):
                raise self._refusal(items, now_s, ahead)
            self._step_aside(items)
        for item in items:
            assert item.urgency not in self._live, "urgency must be unique"
            self._live[item.urgency] = item

    def _is_trial(self, items: Sequence[Item], now_s: float) -> bool:
        """Whether samples are let in to learn from: the engine has been idle for a while, and at best they are in time.

        Calm calls teach too much as well, where something else kept the machine busy; what they taught does not fade.
        """
        is_due = not self._live and now_s >= self._called_s + self._trial_pause_s(items)
        return is_due and self._unloaded_s(items, self.costs.least()) <= min(
            item.promised_s - now_s + item.hand_over_s + item.encoding_s for item in items
        )

    def _trial_pause_s(self, items: Sequence[Item]) -> float:
        """Seconds from the last call to a trial: so a small share of the time goes to promises that may be broken."""
        return max(TRIAL_S, TRIAL_TIMES * self._unloaded_s(items, self.costs.least()))

    def _step_aside(self, items: Sequence[Item]) -> None:
        """Have samples without a promise wait behind all promises, and share no call, which would make it longer."""
        behind_s = max(item.promised_s for item in self._live.values() if item.promised_s < NEVER_S)
        for item in items:
            item.urgency = (behind_s, item.urgency[1])
            item.share_no_call()

    def _note_demand(self, items: Sequence[Item], now_s: float) -> None:
        """Count what is asked for, also what will be refused; not what finds the engine idle.

        A lone client that asks again as soon as it is answered would otherwise be taken for load: fewer steps let it
        ask more often, which would keep its steps few.
        """
        if not self._live:
            return
        for item in items:
            if item.is_background:
                continue
            window_s = self._window_s(item)
            if item.open_steps:
                self._open_demand.add(1, now_s, window_s)
            else:
                work_s = item.seconds_shared(self.costs, item.steps_left, self.capacity)
                self._settled_demand.add(work_s, now_s, window_s)

    def _window_s(self, item: Item) -> float:
        """Time in which it shows how much is asked for: of many samples like this one."""
        return max(MIN_WINDOW_S, DEMAND_WINDOW * item.seconds_left(self.costs))

    def remove(self, item: Item) -> None:
        """Let a finished, failed or cancelled sample leave."""
        del self._live[item.urgency]
        self._together.discard(item)

    def backlog_s(self, deadline_s: float = NEVER_S) -> float:
        """Seconds of work that is due until a deadline, in batches of the size that the costs suggest."""
        due = [item for item in self._live.values() if item.urgency[0] <= deadline_s]
        return sum(
            item.seconds_left(self.costs, size) / size
            for item in due
            if (size := self.costs.batch_size(item.denoise.kind, min(len(due), self.capacity)))
        )

    def _refusal(self, items: Sequence[Item], now_s: float, ahead: Forecast) -> TDMError:
        """Why a budget is not promised, and when it would be, or with which one.

        Args:
            ahead: the forecast with these items, in which a promise is broken.
        """
        hardest = min(items, key=lambda item: item.promised_s)
        left_s, unloaded_s = hardest.promised_s - now_s, self._unloaded_s(items, self.costs)
        taken = (
            f"latency_budget_ms leaves {_at_most(left_s)} ms: {_at_least(hardest.elapsed_s)} ms had passed, "
            f"handing over takes {_at_least(hardest.hand_over_s)} ms and encoding {_at_least(hardest.encoding_s)} ms; "
            f"{_counted(len(items), 'picture')} of {_counted(items[0].steps_left, 'step')} would take "
            f"{_at_least(unloaded_s)} ms with nothing else to do"
        )
        room_s = left_s + hardest.elapsed_s + hardest.hand_over_s + TOLERANCE_S
        if self._unloaded_s(items, self.costs.least()) > room_s:
            workable_s = unloaded_s + hardest.elapsed_s + hardest.hand_over_s + hardest.encoding_s
            return InvalidRequestError(
                f"{taken}, allow for at least {_at_least(workable_s)} ms or ask for fewer steps",
                param="latency_budget_ms",
                code="latency_budget_too_small",
            )
        assert ahead.broken is not None
        done_s, spare = ahead.finish_s[ahead.broken] - now_s, f"{_at_least(ahead.margin_s)} ms are kept for slow calls"
        if ahead.broken in (item.urgency for item in items):
            reason = f"{_at_least(max(0.0, done_s - unloaded_s))} ms of work come before and {spare}"
        else:
            due_s = self._live[ahead.broken].promised_s - now_s
            reason = (
                f"a picture promised before would be late: it is due in {_at_most(due_s)} ms, would be done in "
                f"{_at_least(done_s)} ms and {spare}"
            )
        wait_s = self._wait_s(items, now_s, unloaded_s, ahead.margin_s)
        return DeadlineError(
            f"{taken}, {reason}, retry later or allow for more",
            retry_after_s=self._turn_s(items, now_s + wait_s) - now_s,
        )

    def _wait_s(self, items: Sequence[Item], now_s: float, unloaded_s: float, margin_s: float) -> float:
        """Time after which a budget that is refused now is expected to be kept, if no other request comes."""
        hardest = min(items, key=lambda item: item.promised_s)
        left_s = hardest.promised_s - now_s
        # Also what is due later: it is what would become late.
        last_s = max(item.promised_s for item in [*items, *self._live.values()] if item.promised_s < NEVER_S)
        running_s = max(0.0, self._running_until_s - now_s) if self._running else 0.0
        idle_s = running_s + self.backlog_s(last_s)
        wait_s = max(MIN_RETURN_S, min(idle_s, idle_s + unloaded_s + margin_s - left_s))
        if unloaded_s > left_s:  # calls are too slow just now even for an idle engine
            last_call_s = now_s + running_s + self.backlog_s() if self._live else self._called_s
            wait_s = max(wait_s, last_call_s + self._trial_pause_s(items) - now_s)
        return wait_s

    def _turn_s(self, items: Sequence[Item], earliest_s: float) -> float:
        """When those who are refused may come back, each at a time of its own: all at once would be refused again."""
        turn_s = min(max(earliest_s, self._returns_s), earliest_s + MAX_RETURN_S)
        self._returns_s = turn_s + sum(
            item.seconds_shared(self.costs, item.steps_left, self.capacity) for item in items
        )
        return turn_s

    def _unloaded_s(self, items: Sequence[Item], costs: CostModel) -> float:
        """How long samples take with nothing else to do."""
        works = [item.copy() for item in items]
        for work in works:
            work.promised_s = NEVER_S
        urgencies = {work.urgency for work in works}
        return max(forecast(works, costs, self.capacity, 0.0, urgencies).finish_s.values())

    # -- what runs next -----------------------------------------------------------------------

    def schedule(self, now_s: float) -> list[Item]:
        """Return the samples of the next call, most urgent first; empty where none is live.

        Those that take their first step have their step count settled and their end predicted.
        """
        self.costs.pass_time(now_s)
        self.end_call()
        self._give_up([item for item in self._live.values() if item.promised_s < now_s])
        batch = self._choice()
        while unsettled := [item for item in batch if item.open_steps]:
            for item in unsettled:
                item.settle(self._most_steps(item, now_s))
            batch = self._choice()
        if not batch:
            return []
        self._predict([item for item in batch if not item.has_started], now_s)
        if not self._joining:
            self._together.update(batch)
        self._running = batch
        self._called_s = now_s
        self._running_until_s = now_s + call_seconds(batch, self.costs)
        return batch

    def end_call(self) -> None:
        """No call runs any more; its samples have moved on or left."""
        self._running = []

    def _choice(self) -> list[Item]:
        ordered = [item for item in self.live() if not self._together or item in self._together]
        return choose(ordered, self.costs, self.capacity) if ordered else []

    def _most_steps(self, item: Item, now_s: float) -> int:
        """The largest step count that has a sample done by its target and breaks no promise; else the smallest.

        Nor does it use up what those need who are to be expected: if all whose step count is left open, as many as came
        lately, took so many steps, that would be some load; so much of the time to the target stays free.
        """
        others = [other for other in self._live.values() if other is not item]
        window_s = self._window_s(item)
        settled = self._settled_demand.per_second(now_s, window_s)
        rate = self._open_demand.per_second(now_s, window_s, less=1)
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
        if not items:
            return
        finish_s = self._ahead(now_s, watched={item.urgency for item in items}).finish_s
        for item in items:
            alone_s = now_s + item.seconds_left(self.costs)
            item.predicted_s = finish_s.get(item.urgency, alone_s)

    # -- promises -----------------------------------------------------------------------------

    def _ahead(
        self, now_s: float, added: Sequence[Work] = (), watched: Collection[Urgency] = (), margin: float = MARGIN
    ) -> Forecast:
        """What becomes of the live samples and those added, from the end of the running call on."""
        works: list[Work] = [*added]
        for item in self._live.values():
            work = item.copy()
            if item not in self._running or not work.advance():
                works.append(work)
        starts_s = max(now_s, self._running_until_s) if self._running else now_s
        return forecast(works, self.costs, self.capacity, starts_s, watched, margin)

    def _give_up_lost(self, now_s: float) -> bool:
        """Take back what is not expected to be kept, whoever else comes: the machine was slower than it was.

        What was promised with something to spare may have used that up since; that is what it was for.

        Returns:
            Whether anything was.
        """
        before = self.num_late
        while (broken := self._ahead(now_s, margin=0.0).broken) is not None:
            self._give_up([self._live[broken]])
        return self.num_late > before

    def _give_up(self, items: Sequence[Item]) -> None:
        """Take promises back: the pictures still come, but do not make others late as well."""
        for item in items:
            self.num_late += 1
            del self._live[item.urgency]
            item.promised_s = NEVER_S
            item.urgency = (max(item.unpromised_s, item.urgency[0]), item.urgency[1])
            self._live[item.urgency] = item
