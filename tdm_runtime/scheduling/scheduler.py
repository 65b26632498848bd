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

from collections.abc import Collection, Sequence
from typing import Generic, TypeVar

from tdm_runtime.errors import DeadlineError, InvalidRequestError, TDMError
from tdm_runtime.scheduling.cost_model import CostModel, Kind
from tdm_runtime.scheduling.demand import MovingRate
from tdm_runtime.scheduling.forecast import MARGIN, Forecast, call_seconds, choose, forecast
from tdm_runtime.scheduling.work import NEVER_S, Urgency, Work

Item = TypeVar("Item", bound=Work)
DEMAND_WINDOW = 20
"""Unloaded times of a sample in which demand is counted."""
MIN_WINDOW_S = 0.25
MAX_RETURN_S = 5.0
"""Who is refused is not sent away for longer because others were, who may not come back."""
MAX_LOAD = 0.7
"""Share of the machine's time, in its best batches, at which open step counts stay at their smallest: chance, batches
that are not the best, and what is not the model's, need the rest."""


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


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

    # -- who is let in ------------------------------------------------------------------------

    def admit(self, items: Sequence[Item], now_s: float) -> None:
        """Let samples join, which may share the very next call, if that breaks no promise; all of them or none.

        Those without a promise are let in in any case, if need be behind all promises.

        Raises:
            DeadlineError: a promise of theirs, or another's because of them, could not be kept now.
            InvalidRequestError: theirs could not be kept with nothing else to do.
        """
        self._note_demand(items, now_s)
        does_break = self._ahead(now_s, items).broken is not None
        if does_break and self._give_up_lost(now_s):
            does_break = self._ahead(now_s, items).broken is not None
        if does_break:
            if any(item.promised_s < NEVER_S for item in items):
                raise self._refusal(items, now_s)
            self._step_aside(items)
        for item in items:
            assert item.urgency not in self._live, "urgency must be unique"
            self._live[item.urgency] = item

    def _step_aside(self, items: Sequence[Item]) -> None:
        """Have samples without a promise wait behind all promises, and share no call, which would make it longer."""
        behind_s = max(item.promised_s for item in self._live.values() if item.promised_s < NEVER_S)
        for item in items:
            item.urgency = (behind_s, item.urgency[1])
            item.share_no_call()

    def _note_demand(self, items: Sequence[Item], now_s: float) -> None:
        """Count what is asked for, also what will be refused."""
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

    def _refusal(self, items: Sequence[Item], now_s: float) -> TDMError:
        """Why a budget is not promised, and when it would be, or with which one."""
        hardest = min(items, key=lambda item: item.promised_s)
        promised_s = hardest.promised_s
        budget_ms, needed_ms = 1e3 * (promised_s - now_s), 1e3 * self._unloaded_s(items)
        what = f"{_counted(len(items), 'picture')} of {_counted(items[0].steps_left, 'step')}"
        if needed_ms > budget_ms + 1e3 * hardest.elapsed_s:
            return InvalidRequestError(
                f"latency_budget_ms leaves {budget_ms:.3g} ms; {what} would take {needed_ms:.3g} ms with nothing "
                "else to do, allow for more or ask for fewer steps",
                param="latency_budget_ms",
                code="latency_budget_too_small",
            )
        # Also what is due later: it is what would become late.
        last_s = max([promised_s, *(item.promised_s for item in self._live.values() if item.promised_s < NEVER_S)])
        ahead_ms = 1e3 * (max(0.0, self._running_until_s - now_s) + self.backlog_s(last_s))
        return DeadlineError(
            f"latency_budget_ms leaves {max(0.0, budget_ms):.3g} ms; {what} would take {needed_ms:.3g} ms and "
            f"{ahead_ms:.3g} ms of work were promised before, retry later or allow for more",
            retry_after_s=self._turn_s(items, now_s + 1e-3 * max(1.0, ahead_ms + needed_ms - budget_ms)) - now_s,
        )

    def _turn_s(self, items: Sequence[Item], earliest_s: float) -> float:
        """When those who are refused may come back, each at a time of its own: all at once would be refused again."""
        turn_s = min(max(earliest_s, self._returns_s), earliest_s + MAX_RETURN_S)
        self._returns_s = turn_s + sum(
            item.seconds_shared(self.costs, item.steps_left, self.capacity) for item in items
        )
        return turn_s

    def _unloaded_s(self, items: Sequence[Item]) -> float:
        """How long samples take with nothing else to do."""
        works = [item.copy() for item in items]
        for work in works:
            work.promised_s = NEVER_S
        urgencies = {work.urgency for work in works}
        return max(forecast(works, self.costs, self.capacity, 0.0, urgencies).finish_s.values())

    # -- what runs next -----------------------------------------------------------------------

    def schedule(self, now_s: float) -> list[Item]:
        """Return the samples of the next call, most urgent first; empty where none is live.

        Those that take their first step have their step count settled and their end predicted.
        """
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
