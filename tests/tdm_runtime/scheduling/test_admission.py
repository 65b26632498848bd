"""Laws of admission after any history of calls: an idle engine accepts what fits, and a refusal is true."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdm_runtime.errors import DeadlineError, InvalidRequestError
from tdm_runtime.scheduling.cost_model import HALF_LIFE_CALLS, CostModel, Kind
from tdm_runtime.scheduling.scheduler import StepScheduler
from tdm_runtime.scheduling.work import TEXT
from tests.refusals import Refusal
from tests.tdm_runtime.scheduling.test_scheduler import SHAPES, STEP_S, Request, known_costs, request, run_call

KINDS = (TEXT, Kind("denoise", SHAPES[0]), Kind("decode:full", SHAPES[0]))
CALMED_S = 4 * HALF_LIFE_CALLS * STEP_S[0]
"""Seconds without a call after which no load is left in the costs of the smallest shape."""
HISTORY = st.lists(
    st.tuples(
        st.sampled_from(KINDS),
        st.sampled_from([1, 2, 4]),  # samples
        st.floats(0.2, 30.0),  # duration, in times of such a call without load
        st.floats(0.0, 60.0),  # seconds since the call before
        st.booleans(),  # calm
    ),
    max_size=60,
)
History = list[tuple[Kind, int, float, float, bool]]


def costs_after(history: History) -> tuple[CostModel, float]:
    """Return costs learned at warm-up and from some calls, and the time at the end."""
    costs, calm, now_s = known_costs(), known_costs(), 0.0
    for kind, size, factor, pause_s, is_calm in history:
        now_s += pause_s
        costs.observe(kind, size, factor * calm.seconds(kind, size), now_s, is_calm)
    return costs, now_s


def idle_since(costs: CostModel, now_s: float) -> StepScheduler[Request]:
    """Return a scheduler without live samples whose last call is so recent that no trial is due."""
    scheduler: StepScheduler[Request] = StepScheduler(costs, 4)
    item = request(10**6)
    scheduler.admit([item], now_s)
    scheduler.schedule(now_s)
    scheduler.end_call()
    scheduler.remove(item)
    return scheduler


def unloaded_s(costs: CostModel, now_s: float, steps: int) -> float:
    return request(0, steps=steps).seconds_left(costs.at(now_s))


@settings(max_examples=200, deadline=None)
@given(history=HISTORY, steps=st.integers(1, 4), pause_s=st.one_of(st.just(0.0), st.floats(0.0, 1e4)))
def test_an_idle_engine_accepts_a_budget_that_fits_without_load(history: History, steps: int, pause_s: float) -> None:
    """It does so right after a storm too: deviations alone refuse nothing."""
    costs, now_s = costs_after(history)
    now_s += pause_s
    budget_s = unloaded_s(costs, now_s, steps) * (1 + 1e-9)
    scheduler = idle_since(costs, now_s)
    scheduler.admit([request(0, steps=steps, now_s=now_s, budget_s=budget_s)], now_s)
    assert len(scheduler) == 1


@settings(max_examples=100, deadline=None)
@given(history=HISTORY, steps=st.integers(1, 4), spare=st.floats(0.02, 2.0))
def test_a_second_after_a_storm_the_same_budgets_are_accepted_as_before(
    history: History, steps: int, spare: float
) -> None:
    storm = [(kind, size, factor, 0.0, False) for kind, size, factor, _, _ in history]
    costs, now_s = costs_after(storm)
    scheduler = idle_since(costs, now_s + CALMED_S)
    budget_s = (1 + spare) * unloaded_s(known_costs(), 0.0, steps)
    for order in range(20):  # refusals teach nothing
        try:
            scheduler.admit([request(order, steps=steps, now_s=now_s, budget_s=budget_s / 10)], now_s)
        except (DeadlineError, InvalidRequestError):
            continue
    assert len(scheduler) == 0
    now_s += CALMED_S
    scheduler.admit([request(20, steps=steps, now_s=now_s, budget_s=budget_s)], now_s)
    assert len(scheduler) == 1


REQUESTS = st.lists(
    st.tuples(
        st.integers(1, 4),  # steps
        st.integers(1, 2),  # pictures
        st.floats(0.2, 6.0),  # budget, in unloaded times
        st.sampled_from([0.0, 0.5, 3.0]),  # seconds of the budget that have passed
        st.integers(0, 2),  # calls before it arrives
    ),
    min_size=1,
    max_size=8,
)


def pictures(order: int, count: int, steps: int, now_s: float, budget_s: float, elapsed_s: float) -> list[Request]:
    made = [request(order + n, steps=steps, now_s=now_s, budget_s=budget_s - elapsed_s) for n in range(count)]
    for item in made:
        item.elapsed_s = elapsed_s
    return made


@settings(max_examples=100, deadline=None)
@given(history=HISTORY, arrivals=REQUESTS, capacity=st.integers(1, 4))
def test_the_numbers_of_a_refusal_add_up_and_its_remedy_helps(
    history: History, arrivals: list[tuple[int, int, float, float, int]], capacity: int
) -> None:
    costs, now_s = costs_after(history)
    scheduler: StepScheduler[Request] = StepScheduler(costs, capacity)
    for order, (steps, count, budget, elapsed_s, num_calls) in enumerate(arrivals):
        for _ in range(num_calls):
            _, now_s = run_call(scheduler, now_s)
        budget_s = budget * count * unloaded_s(costs, now_s, steps) + elapsed_s
        idle: StepScheduler[Request] = StepScheduler(costs, capacity)
        try:
            scheduler.admit(pictures(2 * order, count, steps, now_s, budget_s, elapsed_s), now_s)
        except InvalidRequestError as error:
            refusal = Refusal(str(error))
            assert refusal.unloaded_ms > refusal.left_ms
            workable_s = 1e-3 * refusal.workable_ms
            assert workable_s > budget_s
            idle.admit(pictures(0, count, steps, now_s, workable_s, elapsed_s), now_s)
        except DeadlineError as error:
            assert Refusal(str(error)).adds_up(), str(error)
            then, then_s = copy.deepcopy(scheduler), now_s
            while len(then):  # no other request comes
                _, then_s = run_call(then, then_s)
            then_s = max(then_s, now_s + error.retry_after_s)
            try:
                then.admit(pictures(2 * order, count, steps, then_s, budget_s, 0.0), then_s)
            except DeadlineError as again:  # the queue took longer than expected; on an idle engine the time is exact
                then_s += again.retry_after_s
                then.admit(pictures(2 * order, count, steps, then_s, budget_s, 0.0), then_s)


def test_slow_calm_calls_keep_no_client_out() -> None:
    """Another program keeps the machine busy while a lone client asks. Refusals do not delay its next trial."""
    scheduler: StepScheduler[Request] = StepScheduler(known_costs(), 1)
    _, now_s = admitted(scheduler, request(0, budget_s=3.0))
    for _ in range(30):
        scheduler.costs.observe(KINDS[1], 1, 5.0, now_s, is_calm=True)
    with pytest.raises(DeadlineError) as caught:
        scheduler.admit([request(1, now_s=now_s, budget_s=3.0)], now_s)
    assert Refusal(str(caught.value)).adds_up()
    later_s = now_s + caught.value.retry_after_s
    for at_s in (now_s + 1.0, later_s - 0.1):
        with pytest.raises(DeadlineError):
            scheduler.admit([request(2, now_s=at_s, budget_s=3.0)], at_s)
    admitted(scheduler, request(3, now_s=later_s, budget_s=3.0), later_s)


def admitted(scheduler: StepScheduler[Request], item: Request, now_s: float = 0.0) -> tuple[Request, float]:
    """Admit a sample and make its calls. Return it and the time at the end."""
    scheduler.admit([item], now_s)
    while item.done_s is None:
        _, now_s = run_call(scheduler, now_s)
    return item, now_s


def test_a_refusal_that_protects_another_promise_names_its_numbers() -> None:
    scheduler: StepScheduler[Request] = StepScheduler(known_costs(0.0), 1)
    scheduler.admit([request(0, steps=4, budget_s=6.0)], 0.0)
    with pytest.raises(DeadlineError, match="a picture accepted earlier would be late: it is due in 6000") as caught:
        scheduler.admit([request(1, steps=1, budget_s=2.0)], 0.0)
    assert Refusal(str(caught.value)).adds_up()


@settings(max_examples=20, deadline=None)
@given(history=HISTORY, steps=st.integers(1, 4))
def test_accepted_calls_teach_that_the_machine_became_slower(history: History, steps: int) -> None:
    """An idle engine accepts budgets that it then misses, but not for ever: it learns from every call."""
    factor, pause_s = 3.0, 15.0
    costs, now_s = costs_after(history)
    for _ in range(200):
        for kind in KINDS:
            now_s += pause_s
            costs.observe(kind, 1, factor * known_costs().seconds(kind), now_s, True)
    expected_s = factor * unloaded_s(known_costs(), 0.0, steps)
    assert unloaded_s(costs, now_s + pause_s, steps) == pytest.approx(expected_s, rel=0.1)
