"""Laws of the scheduler under any order of arrivals, calls and departures."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tdm_runtime.errors import DeadlineError, InvalidRequestError
from tdm_runtime.scheduling.cost_model import CostModel, Kind
from tdm_runtime.scheduling.forecast import call_seconds, forecast
from tdm_runtime.scheduling.scheduler import MAX_RETURN_S, StepScheduler
from tdm_runtime.scheduling.work import NEVER_S, TEXT, Lane, Work

SHAPES = ((4, 8, 8), (4, 16, 16), (4, 64, 64))
STEP_S = (1.0, 2.0, 20.0)
"""Seconds of a step of one sample, by shape."""
EPSILON_S = 1e-6


def known_costs(gain: float = 0.5) -> CostModel:
    """Return costs in which a call of n samples takes (1 - gain) n + gain times as long as a call of one."""
    costs = CostModel()
    for shape, step_s in zip(SHAPES, STEP_S, strict=True):
        for size in range(1, 9):
            costs.observe(Kind("denoise", shape), size, step_s * (gain + (1 - gain) * size), 0.0)
            costs.observe(Kind("decode:full", shape), size, 0.7 * step_s * size, 0.0)
            costs.observe(Kind("encode_image", shape), size, 0.4 * step_s * size, 0.0)
    costs.observe(TEXT, 1, 0.1, 0.0)
    return costs


@dataclass(eq=False, kw_only=True)
class Request(Work):
    """A sample that records its calls and its end."""

    asked_s: float = NEVER_S
    """Deadline that it was promised, kept even if the promise was given up."""
    calls: list[str] = field(default_factory=list)
    settled: int = 0
    edits: bool = False
    """Whether it changes a given picture."""
    done_s: float | None = None

    def settle(self, steps: int) -> None:
        super().settle(steps)
        self.settled = steps


def request(
    order: int,
    shape: int = 0,
    steps: int = 1,
    *,
    now_s: float = 0.0,
    budget_s: float | None = None,
    open_steps: tuple[int, ...] = (),
    due_s: float | None = None,
    alone: bool = False,
    edits: bool = False,
) -> Request:
    kind, number = SHAPES[shape], order if alone else None
    promised_s = NEVER_S if budget_s is None else now_s + budget_s
    last_s = now_s + 20 * STEP_S[shape] * steps if due_s is None else due_s
    return Request(
        denoise=Lane(Kind("denoise", kind), number),
        decode=Lane(Kind("decode:full", kind), number),
        steps_left=open_steps[0] if open_steps else steps,
        open_steps=open_steps,
        urgency=(last_s if budget_s is None else promised_s, order),
        promised_s=promised_s,
        asked_s=promised_s,
        target_s=last_s if budget_s is None else promised_s,
        unpromised_s=last_s,
        needs_text=True,
        needs_image=edits,
        image=Kind("encode_image", kind),
        edits=edits,
        settled=0 if open_steps else steps,
    )


def run_call(scheduler: StepScheduler[Request], now_s: float, is_exact: bool = True) -> tuple[list[Request], float]:
    """Make one call that takes exactly the predicted time. Return its samples and the time of its end."""
    batch = scheduler.schedule(now_s)
    if not batch:
        return [], now_s
    now_s += call_seconds(batch, scheduler.costs)
    scheduler.end_call()
    for item in batch:
        item.calls.append(item.call_kind.stage)
        if item.advance():
            item.done_s = now_s
            scheduler.remove(item)
    return batch, now_s


def first_step(scheduler: StepScheduler[Request], now_s: float = 0.0) -> tuple[list[Request], float]:
    """Encode prompts and pictures until a step is due. Return its samples, before they take it, and its start."""
    while (batch := scheduler.schedule(now_s)) and not batch[0].is_prepared:
        now_s += call_seconds(batch, scheduler.costs)
        scheduler.end_call()
        for item in batch:
            item.advance()
    return batch, now_s


class AnyTraffic(RuleBasedStateMachine):
    """Samples arrive, share calls and leave, finished or cancelled. Time passes only in calls."""

    @initialize(capacity=st.integers(1, 5), gain=st.sampled_from([0.0, 0.5, 0.9]))
    def open(self, capacity: int, gain: float) -> None:
        self.scheduler: StepScheduler[Request] = StepScheduler(known_costs(gain), capacity)
        self.accepted: list[Request] = []
        self.gone: set[Request] = set()
        self.now_s = 0.0
        self.order = 0

    @property
    def live(self) -> list[Request]:
        return [item for item in self.accepted if item not in self.gone and item.done_s is None]

    @rule(
        shape=st.integers(0, 2),
        steps=st.integers(1, 4),
        budget=st.one_of(st.none(), st.floats(1.0, 12.0)),
        is_auto=st.booleans(),
        count=st.integers(1, 3),
        alone=st.booleans(),
        edits=st.booleans(),
    )
    def arrive(
        self, shape: int, steps: int, budget: float | None, is_auto: bool, count: int, alone: bool, edits: bool
    ) -> None:
        open_steps = tuple(range(1, steps + 1)) if is_auto else ()
        budget_s = None if budget is None else budget * STEP_S[shape]
        items = []
        for _ in range(count):
            items.append(
                request(
                    self.order,
                    shape,
                    steps,
                    now_s=self.now_s,
                    budget_s=budget_s,
                    open_steps=open_steps,
                    alone=alone,
                    edits=edits,
                )
            )
            self.order += 1
        before = self.scheduler.live()
        try:
            self.scheduler.admit(items, self.now_s)
        except (DeadlineError, InvalidRequestError) as error:
            assert budget is not None, "only requests with a budget are refused"
            assert self.scheduler.live() == before, "a refusal changes nothing"
            if isinstance(error, DeadlineError):
                assert error.retry_after_s > 0
            return
        self.accepted += items

    @precondition(lambda self: self.live)
    @rule(choice=st.randoms(use_true_random=False))
    def cancel(self, choice: object) -> None:
        item = choice.choice(self.live)  # type: ignore[attr-defined]
        self.scheduler.remove(item)
        self.gone.add(item)

    @rule()
    def call(self) -> None:
        live = {item.urgency: item for item in self.live}
        stages, readers = {item: item.lane for item in self.live}, {item for item in self.live if item.needs_text}
        editors = {item for item in self.live if item.needs_image and not item.needs_text}
        batch, self.now_s = run_call(self.scheduler, self.now_s)
        assert len(batch) == len(set(batch)) <= self.scheduler.capacity
        assert set(batch) <= set(live.values())
        if not live:
            assert not batch
            return
        most_urgent = live[min(live)]
        assert {stages[item] for item in batch} == {stages[most_urgent]}, "a call serves the most urgent sample"
        peers = sorted(
            (item for item in live.values() if stages[item] == stages[batch[0]]), key=lambda item: item.urgency
        )
        is_step = batch[0] not in readers | editors
        if not is_step:
            alike = readers if batch[0] in readers else editors
            peers = [item for item in peers if item in alike]
        assert not is_step or most_urgent in batch, "the most urgent sample is in the batch"
        assert batch == peers[: len(batch)], "a less urgent sample of the lane went first"
        assert not is_step or not (readers | editors) & set(batch), "prompt and picture come before the first step"
        assert not is_step or all(not item.open_steps for item in batch), "a step count is fixed with the first step"

    @invariant()
    def live_samples_are_known_in_order_of_urgency(self) -> None:
        if hasattr(self, "scheduler"):
            assert self.scheduler.live() == sorted(self.live, key=lambda item: item.urgency)
            assert len(self.scheduler) == len(self.live)

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for _ in range(sum(len(item.open_steps) + item.steps_left + 3 for item in self.live) + 1):
            self.call()
        assert not self.live
        for item in self.accepted:
            if item not in self.gone:
                before = ["text", "encode_image"] if item.edits else ["text"]
                assert item.calls == [*before, *["denoise"] * item.settled, "decode:full"]


AnyTraffic.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestAnyTraffic = AnyTraffic.TestCase

ARRIVALS = st.lists(
    st.tuples(
        st.integers(0, 2),  # shape
        st.integers(1, 4),  # steps
        st.one_of(st.none(), st.floats(1.5, 15.0)),  # budget, in step times of its shape
        st.booleans(),  # auto
        st.integers(0, 3),  # calls before it arrives
    ),
    max_size=14,
)


@settings(max_examples=150, deadline=None)
@given(arrivals=ARRIVALS, capacity=st.integers(1, 5), gain=st.sampled_from([0.0, 0.5, 0.9]))
def test_while_calls_take_their_known_time_every_deadline_is_met(
    arrivals: list[tuple[int, int, float | None, bool, int]], capacity: int, gain: float
) -> None:
    scheduler: StepScheduler[Request] = StepScheduler(known_costs(gain), capacity)
    accepted: list[Request] = []
    now_s = 0.0
    for order, (shape, steps, budget, is_auto, pause) in enumerate(arrivals):
        for _ in range(pause):
            _, now_s = run_call(scheduler, now_s)
        item = request(
            order,
            shape,
            steps,
            now_s=now_s,
            budget_s=None if budget is None else budget * STEP_S[shape],
            open_steps=tuple(range(1, steps + 1)) if is_auto else (),
            edits=order % 2 == 1,
        )
        try:
            scheduler.admit([item], now_s)
        except (DeadlineError, InvalidRequestError):
            continue
        accepted.append(item)
    while len(scheduler):
        _, now_s = run_call(scheduler, now_s)
    assert scheduler.num_late == 0
    for item in accepted:
        assert item.done_s is not None and item.done_s <= item.asked_s + EPSILON_S


# -- admission -------------------------------------------------------------------------------------


def scheduler_of(*items: Request, capacity: int = 1, gain: float = 0.0) -> StepScheduler[Request]:
    scheduler: StepScheduler[Request] = StepScheduler(known_costs(gain), capacity)
    for item in items:
        scheduler.admit([item], 0.0)
    return scheduler


def test_a_budget_too_small_for_an_idle_engine_is_invalid() -> None:
    with pytest.raises(
        InvalidRequestError,
        match=r"latency_budget_ms leaves 2000\.0 ms: .*; an idle engine needs .* for 1 picture of 4 steps",
    ) as caught:
        scheduler_of(request(0, steps=4, budget_s=2.0))
    assert (caught.value.param, caught.value.code) == ("latency_budget_ms", "latency_budget_too_small")


def test_a_refused_budget_is_accepted_after_the_named_retry_time() -> None:
    scheduler = scheduler_of(request(0, steps=4, budget_s=5.0))
    with pytest.raises(DeadlineError) as caught:
        scheduler.admit([request(1, steps=2, budget_s=3.0)], 0.0)
    later_s = now_s = 0.0
    while now_s < caught.value.retry_after_s:
        _, ended_s = run_call(scheduler, now_s)
        later_s = now_s = max(ended_s, now_s + 0.1)
    scheduler.admit([request(2, steps=2, now_s=later_s, budget_s=3.0)], later_s)


def test_a_budget_used_up_by_other_requests_may_be_retried() -> None:
    """A budget of 5 s is enough, but 3.5 s have passed in the queue, so the request is valid and late."""
    late = request(0, steps=2, budget_s=1.5)
    late.elapsed_s = 3.5
    with pytest.raises(DeadlineError):
        scheduler_of(late)


def test_refused_requests_get_different_retry_times_within_a_bound() -> None:
    """If all eight came back at once, seven would be refused again."""
    scheduler = scheduler_of(request(0, steps=4, budget_s=5.0))
    retries_s = []
    for order in range(1, 9):
        with pytest.raises(DeadlineError) as caught:
            scheduler.admit([request(order, steps=2, budget_s=3.0)], 0.0)
        retries_s.append(caught.value.retry_after_s)
    assert all(later > earlier for earlier, later in pairwise(retries_s[:3]))
    assert max(retries_s) <= retries_s[0] + MAX_RETURN_S


def test_a_promise_needs_a_reserve_when_given_and_may_use_it_up_later() -> None:
    costs = known_costs()
    denoise = Kind("denoise", SHAPES[0])
    for seconds in (0.5, 1.5) * 20:
        costs.observe(denoise, 1, seconds, 0.0)
    fits_s = scheduler_of().costs.seconds(denoise) + 0.7 + 0.1
    scheduler: StepScheduler[Request] = StepScheduler(costs, 1)
    first = request(0, budget_s=4 * fits_s)
    scheduler.admit([first], 0.0)
    with pytest.raises(DeadlineError):  # it could go first and is expected in time, but without a reserve
        scheduler.admit([request(1, budget_s=1.3 * fits_s)], 0.0)
    with pytest.raises(DeadlineError):  # the first has used up its reserve and is still expected in time
        scheduler.admit([request(2, budget_s=2 * fits_s, now_s=2.5 * fits_s)], 2.5 * fits_s)
    assert (scheduler.num_late, scheduler.live()) == (0, [first])


def test_a_request_that_would_break_an_earlier_promise_is_refused() -> None:
    first = request(0, steps=4, budget_s=6.0)
    scheduler = scheduler_of(first)
    with pytest.raises(DeadlineError):
        scheduler.admit(
            [request(1, steps=1, budget_s=2.0)], 0.0
        )  # it could go first, but would make the earlier one late
    assert scheduler.live() == [first]


def test_all_pictures_of_a_request_are_accepted_or_none() -> None:
    scheduler = scheduler_of()
    with pytest.raises(InvalidRequestError, match="3 pictures"):
        scheduler.admit([request(n, steps=1, budget_s=4.0) for n in range(3)], 0.0)
    assert len(scheduler) == 0
    scheduler.admit([request(n, steps=1, budget_s=4.0) for n in range(2)], 0.0)
    assert len(scheduler) == 2


def test_a_request_without_a_budget_is_accepted_behind_all_promises() -> None:
    promised = request(0, steps=2, budget_s=3.0)
    scheduler = scheduler_of(promised)
    hasty = request(1, shape=1, due_s=1.0)
    scheduler.admit([hasty], 0.0)
    assert scheduler.live() == [promised, hasty]


def test_a_missed_promise_makes_no_other_late() -> None:
    slow, other = request(0, steps=3, budget_s=4.0), request(1, budget_s=7.0)
    scheduler = scheduler_of(slow, other)
    assert scheduler.schedule(5.0) == [other], "the machine stood still and the first promise is missed"
    assert scheduler.num_late == 1
    assert slow.promised_s == NEVER_S


def test_a_promise_that_can_no_longer_be_kept_blocks_no_request() -> None:
    scheduler = scheduler_of(request(0, steps=4, budget_s=5.0))
    scheduler.admit(
        [request(1, now_s=2.0, budget_s=2.5)], 2.0
    )  # nothing has run, so the first cannot be in time any more
    assert scheduler.num_late == 1
    assert scheduler.live()[0].urgency[1] == 1


# -- automatic step counts -------------------------------------------------------------------------


@pytest.mark.parametrize(("budget_s", "steps"), [(1.9, 1), (2.9, 2), (3.9, 3), (4.9, 4), (50.0, 4)])
def test_auto_takes_the_most_steps_that_the_budget_allows(budget_s: float, steps: int) -> None:
    item = request(0, steps=4, budget_s=budget_s, open_steps=(1, 2, 3, 4))
    assert first_step(scheduler_of(item))[0] == [item]
    assert item.steps_left == item.settled == steps


def test_auto_takes_fewer_steps_where_more_would_break_a_promise() -> None:
    item, behind = (request(n, steps=4, budget_s=6.0 + n, open_steps=(1, 2, 3, 4)) for n in range(2))
    scheduler = scheduler_of(item, behind, request(2, steps=2, budget_s=9.0))
    first_step(scheduler)
    assert item.settled == 3, "1 + 2 steps of the others and three decodes take about five of nine seconds"


def test_auto_without_a_budget_meets_its_target_and_is_never_refused() -> None:
    item = request(0, steps=4, open_steps=(1, 2, 3, 4), due_s=3.0)
    scheduler = scheduler_of(item)
    first_step(scheduler)
    assert item.settled == 2
    late = request(1, steps=4, open_steps=(1, 2, 3, 4), due_s=0.1)
    scheduler.admit([late], 0.0)
    assert late in scheduler.live()


def test_a_lone_client_gets_the_most_steps_however_often_it_asks() -> None:
    """Quick answers let it ask more often. That is no load, as nothing waits."""
    scheduler, now_s = scheduler_of(), 0.0
    for order in range(40):
        item = request(order, now_s=now_s, budget_s=1.2 * 4.8, open_steps=(1, 2, 3, 4))
        scheduler.admit([item], now_s)
        while item.done_s is None:
            _, now_s = run_call(scheduler, now_s)
        assert item.settled == 4


def test_clients_that_overlap_get_fewer_steps() -> None:
    scheduler, now_s, order = scheduler_of(), 0.0, 0
    settled: list[int] = []
    for _ in range(20):
        clients = [request(order + n, now_s=now_s, budget_s=12.0, open_steps=(1, 2, 3, 4)) for n in range(2)]
        order += 2
        for item in clients:
            scheduler.admit([item], now_s)
        while any(item.done_s is None for item in clients):
            _, now_s = run_call(scheduler, now_s)
        settled += [item.settled for item in clients]
    assert max(settled[-4:]) < 4, (
        "12 s are enough for two pictures of four steps, but leave no time for requests to come"
    )


def test_auto_never_takes_fewer_steps_than_the_minimum() -> None:
    with pytest.raises(InvalidRequestError):
        scheduler_of(request(0, steps=4, budget_s=2.0, open_steps=(2, 3, 4)))


# -- order and batches -----------------------------------------------------------------------------


def test_a_short_sample_overtakes_a_long_one_after_one_call() -> None:
    large = request(0, shape=2, steps=4)
    scheduler = scheduler_of(large)
    batch, now_s = run_call(scheduler, 0.0)
    small = request(1, shape=0, steps=4, now_s=now_s)
    scheduler.admit([small], now_s)
    while small.done_s is None:
        _, now_s = run_call(scheduler, now_s)
    assert batch == [large] and len(large.calls) == 1


def test_a_long_sample_is_not_overtaken_for_ever() -> None:
    scheduler = scheduler_of(request(0, shape=2, steps=1), request(1, steps=1))
    large = scheduler.live()[-1]
    now_s, order = 0.0, 2
    while large.done_s is None:
        batch, now_s = run_call(scheduler, now_s)
        if batch[0].calls[-1] != "text":  # prompts take no time, so one arrival each would be far more load
            scheduler.admit([request(order, steps=1, now_s=now_s)], now_s)
            order += 1
        assert now_s < 2 * large.unpromised_s
    assert large.done_s > large.unpromised_s - 3 * STEP_S[2], "short samples did overtake it"


def test_a_batch_grows_only_if_sharing_saves_time() -> None:
    items = [request(n) for n in range(6)]
    assert len(scheduler_of(*items, capacity=8, gain=0.0).schedule(0.0)) == 1, "sharing saves nothing"
    items = [request(n) for n in range(6)]
    assert len(scheduler_of(*items, capacity=8, gain=0.9).schedule(0.0)) == 6


def test_a_batch_grows_only_as_far_as_a_promise_allows() -> None:
    urgent = request(0, steps=1, budget_s=2.0)
    scheduler = scheduler_of(urgent, *(request(n) for n in range(1, 6)), capacity=8, gain=0.9)
    assert scheduler.schedule(0.0)[0] is urgent
    batch, now_s = run_call(scheduler, 0.0)
    assert 1 < len(batch) < 6, "each that joins adds 0.1 s, and 0.1 s for its prompt: not all fit before 2.0 - 0.7"
    while urgent.done_s is None:
        _, now_s = run_call(scheduler, now_s)
    assert urgent.done_s <= 2.0


def test_a_sample_that_must_be_alone_shares_no_call() -> None:
    items = [request(n, alone=n < 2) for n in range(4)]
    scheduler = scheduler_of(*items, capacity=8, gain=0.9)
    sizes = []
    now_s = 0.0
    while batch := (made := run_call(scheduler, now_s))[0]:
        now_s = made[1]
        sizes.append(sorted(item.urgency[1] for item in batch))
    assert [0] in sizes and [1] in sizes and [2, 3] in sizes


def test_without_joining_a_newcomer_waits_for_all_that_started_together() -> None:
    together = [request(n, steps=2 + n) for n in range(2)]
    scheduler: StepScheduler[Request] = StepScheduler(known_costs(0.9), 8, joining=False)
    scheduler.admit(together, 0.0)
    _, now_s = run_call(scheduler, first_step(scheduler)[1])
    newcomer = request(2, now_s=now_s, due_s=0.0)
    scheduler.admit([newcomer], now_s)
    while any(item.done_s is None for item in together):
        batch, now_s = run_call(scheduler, now_s)
        assert newcomer not in batch
    batch, _ = run_call(scheduler, now_s)
    assert batch == [newcomer]


def test_a_forecast_equals_what_happens() -> None:
    items = [request(n, shape=n % 3, steps=1 + n % 4) for n in range(7)]
    scheduler = scheduler_of(*items, capacity=3, gain=0.5)
    seen = forecast(items, scheduler.costs, 3, 0.0, {item.urgency for item in items})
    now_s = 0.0
    while len(scheduler):
        _, now_s = run_call(scheduler, now_s)
    for item in items:
        assert item.done_s == pytest.approx(seen.finish_s[item.urgency])


def test_without_live_samples_the_batch_is_empty() -> None:
    assert scheduler_of(capacity=3).schedule(0.0) == []


def test_removing_a_sample_that_is_not_live_fails() -> None:
    with pytest.raises(KeyError):
        scheduler_of().remove(request(0))


@pytest.mark.parametrize("capacity", [0, -1])
def test_a_batch_holds_at_least_one_sample(capacity: int) -> None:
    with pytest.raises(ValueError, match=f"capacity is {capacity}"):
        StepScheduler(CostModel(), capacity)


def test_the_scheduler_imports_neither_torch_nor_numpy() -> None:
    code = "import sys, tdm_runtime.scheduling.scheduler; print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
