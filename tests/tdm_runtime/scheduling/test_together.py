"""Alike samples travel together, and the engine waits for clients that return; others join between steps."""

from __future__ import annotations

import heapq
import random
import statistics
from collections.abc import Iterable, Iterator, Sequence
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdm_runtime.errors import DeadlineError
from tdm_runtime.scheduling.cost_model import CostModel
from tdm_runtime.scheduling.forecast import call_seconds
from tdm_runtime.scheduling.scheduler import StepScheduler
from tdm_runtime.scheduling.together import RETURN_WINDOW, Returns
from tdm_runtime.scheduling.work import TEXT, TOLERANCE_S
from tests.tdm_runtime.scheduling.test_scheduler import Request, request

K = 4
UNLOADED_S = K * 1.0 + 0.9 + 0.1
"""Seconds of a sample without load."""


def shared_costs(fixed: float = 0.45, sizes: Iterable[int] = range(1, 9)) -> CostModel:
    """Return costs like those of the embedded model: a batch of 4 takes 2.6 times as long as one sample.

    Args:
        fixed: Share of a call that does not depend on its samples.
        sizes: Batch sizes up to 8; a call has one of them.
    """
    costs = CostModel()
    sample = request(0)
    for kind in (sample.denoise.kind, sample.decode.kind, TEXT):
        costs.limit(kind, 8)
    for size in sizes:
        costs.observe(sample.denoise.kind, size, fixed + (1 - fixed) * size, 0.0)
        costs.observe(sample.decode.kind, size, 0.9 * (fixed / 2 + (1 - fixed / 2) * size), 0.0)
        costs.observe(TEXT, size, 0.09 + 0.01 * size, 0.0)
    return costs


class Traffic:
    """A simulated engine with its clients: calls take their known time, and a wait ends when somebody arrives."""

    def __init__(self, needs_text: bool = True, costs: CostModel | None = None, joining: bool = True) -> None:
        self._needs_text = needs_text
        self.scheduler: StepScheduler[Request] = StepScheduler(costs or shared_costs(), 8, joining)
        self.now_s = 0.0
        self.done: list[Request] = []
        self.batches: list[list[Request]] = []
        """Samples of each denoiser call."""
        self.mixed: list[list[Request]] = []
        """Samples of the denoiser calls that samples at different steps shared."""
        self.waited_s = 0.0
        self._arrivals: list[tuple[float, int, Request]] = []
        self._orders = count()

    def ask(self, at_s: float, steps: int = K, budget_s: float | None = None) -> Request:
        item = request(next(self._orders), steps=steps, now_s=at_s, budget_s=budget_s)
        item.needs_text = self._needs_text
        heapq.heappush(self._arrivals, (at_s, item.urgency[1], item))
        return item

    def calls(self) -> Iterator[list[Request]]:
        """Make calls for as long as there is work. Yield the finished samples of each."""
        while self._arrivals or len(self.scheduler):
            if not len(self.scheduler):
                self.now_s = max(self.now_s, self._arrivals[0][0])
            self._admit()
            wait_s = self.scheduler.wait_s(self.now_s)
            if wait_s:
                until_s = min([self.now_s + wait_s, *(at_s for at_s, _, _ in self._arrivals[:1])])
                self.waited_s += until_s - self.now_s
                self.now_s = until_s
                continue
            yield self._call()

    def _admit(self) -> None:
        while self._arrivals and self._arrivals[0][0] <= self.now_s:
            at_s, _, item = heapq.heappop(self._arrivals)
            self.scheduler.admit([item], at_s)

    def _call(self) -> list[Request]:
        batch = self.scheduler.schedule(self.now_s)
        if batch[0].is_prepared and batch[0].steps_left:
            self.batches.append(batch)
            if len({item.steps_left for item in batch}) > 1:
                self.mixed.append(batch)
        self.now_s += call_seconds(batch, self.scheduler.costs)
        self._admit()  # requests arrive while the call runs
        self.scheduler.end_call()
        finished = [item for item in batch if item.advance()]
        for item in finished:
            item.done_s = self.now_s
            self.scheduler.remove(item)
            self.scheduler.answered(item, self.now_s)
        self.done += finished
        return finished


def closed_loop(traffic: Traffic, clients: int, pictures: int, delay_s: float = 0.2, spread_s: float = 0.05) -> None:
    """Run clients that ask again a moment after each answer, first at different times."""
    for client in range(clients):
        traffic.ask(1.7 * client)
    for finished in traffic.calls():
        for n, _ in enumerate(finished):
            if len(traffic.done) < pictures:
                traffic.ask(traffic.now_s + delay_s + spread_s * n)


@pytest.mark.parametrize("clients", [2, 3, 4])
def test_clients_that_return_at_once_find_each_other(clients: int) -> None:
    traffic = Traffic()
    closed_loop(traffic, clients, pictures=40 * clients)
    assert not any(batch[0].urgency[1] > 10 * clients for batch in traffic.mixed)
    settled = traffic.batches[len(traffic.batches) // 2 : -2 * K]
    assert {len(batch) for batch in settled} == {clients}


def test_travelling_together_makes_more_pictures_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    together = Traffic()
    closed_loop(together, 4, pictures=200)
    monkeypatch.setattr("tdm_runtime.scheduling.together.ALIKE", 10**9)
    joining = Traffic()
    closed_loop(joining, 4, pictures=200)
    assert joining.waited_s == 0.0
    assert together.now_s < 0.95 * joining.now_s


def test_a_client_that_is_alone_never_waits() -> None:
    traffic = Traffic()
    closed_loop(traffic, 1, pictures=100)
    assert traffic.waited_s == 0.0
    assert all(len(batch) == 1 for batch in traffic.batches)


def test_no_wait_is_longer_than_the_window_if_clients_stop_returning() -> None:
    traffic = Traffic()
    closed_loop(traffic, 4, pictures=100)
    late = traffic.ask(traffic.now_s + 0.2)
    assert late in [item for finished in traffic.calls() for item in finished]
    assert late.done_s is not None
    assert late.done_s - late.urgency[0] <= 0  # its deadline without a promise
    assert traffic.waited_s < 100 * RETURN_WINDOW * UNLOADED_S
    sent_s = traffic.now_s + 0.2
    for_long = traffic.ask(sent_s)
    list(traffic.calls())
    assert for_long.done_s is not None
    assert for_long.done_s - sent_s <= (1 + RETURN_WINDOW) * UNLOADED_S + 0.1


def full_group_s(costs: CostModel) -> float:
    """Return the seconds of eight samples of K steps that start together."""
    sample = request(0)
    return K * costs.seconds(sample.denoise.kind, 8) + costs.seconds(sample.decode.kind, 8) + costs.seconds(TEXT, 8)


def median_s(steps: list[int], fixed: float, load: float, joining: bool = True) -> float:
    """Return the median time of 600 requests that come at random, and check that the engine never waited for one.

    Args:
        steps: Step counts that requests draw.
        fixed: See `shared_costs`.
        load: Share of what the engine makes of K steps in batches of 8.
    """
    costs = shared_costs(fixed, sizes=(1, 2, 4, 8))
    draws, traffic, at_s, asked = random.Random(1), Traffic(costs=costs, joining=joining), 0.0, {}
    group_s = full_group_s(costs)
    for _ in range(600):
        at_s += draws.expovariate(load * 8 / group_s)
        asked[traffic.ask(at_s, steps=draws.choice(steps))] = at_s
    list(traffic.calls())
    assert len(traffic.done) == 600 and traffic.waited_s == 0.0
    return statistics.median(item.done_s - since_s for item, since_s in asked.items() if item.done_s is not None)


@pytest.mark.parametrize(("fixed", "most"), [(0.45, 0.95), (0.9, 0.7)])
def test_alike_requests_that_come_at_random_are_sooner_done_if_they_start_together(
    fixed: float, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    together_s = median_s([K], fixed, load=0.9)
    monkeypatch.setattr("tdm_runtime.scheduling.together.ALIKE", 10**9)
    assert together_s < most * median_s([K], fixed, load=0.9)


def promised(fixed: float, load: float, times: tuple[float, float], count: int = 400) -> tuple[Traffic, list[Request]]:
    """Send alike requests at random, each with a budget. Return the traffic and the refused requests.

    Args:
        fixed: See `shared_costs`.
        load: Share of what the engine makes in batches of 8.
        times: Least and largest budget, in times of a sample without load.
    """
    draws, traffic, at_s, refused = random.Random(2), Traffic(costs=shared_costs(fixed, (1, 2, 4, 8))), 0.0, []
    group_s = full_group_s(traffic.scheduler.costs)
    admit = traffic.scheduler.admit

    def admit_or_refuse(items: Sequence[Request], now_s: float) -> None:
        try:
            admit(items, now_s)
        except DeadlineError:
            refused.extend(items)

    traffic.scheduler.admit = admit_or_refuse  # type: ignore[method-assign]
    for _ in range(count):
        at_s += draws.expovariate(load * 8 / group_s)
        traffic.ask(at_s, budget_s=draws.uniform(*times) * UNLOADED_S)
    list(traffic.calls())
    return traffic, refused


def test_alike_requests_with_ample_budgets_start_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """At full load all are accepted that start together, and some are refused that join between steps."""
    together, refused = promised(0.9, 1.0, (12, 12))
    assert len(together.done) == 400 and not refused
    monkeypatch.setattr("tdm_runtime.scheduling.together.ALIKE", 10**9)
    _, refused = promised(0.9, 1.0, (12, 12))
    assert len(refused) > 20


@pytest.mark.parametrize("fixed", [0.1, 0.45, 0.9])
@pytest.mark.parametrize("load", [0.6, 1.2])
def test_every_accepted_budget_of_alike_requests_is_kept(fixed: float, load: float) -> None:
    """Newcomers wait for those that started only while that breaks no promise, of either."""
    traffic, refused = promised(fixed, load, (1.3, 10))
    assert len(traffic.done) + len(refused) == 400 and len(traffic.done) > 100
    assert traffic.scheduler.num_late == 0
    assert all(item.done_s is not None and item.done_s <= item.promised_s + TOLERANCE_S for item in traffic.done)


@pytest.mark.parametrize(("fixed", "most"), [(0.45, 1.0), (0.9, 0.6)])
def test_requests_with_different_step_counts_are_sooner_done_if_they_join_between_steps(
    fixed: float, most: float
) -> None:
    steps = [1, 2, 3, 4]
    assert median_s(steps, fixed, load=0.9) < most * median_s(steps, fixed, load=0.9, joining=False)


def test_nobody_waits_beside_a_promise() -> None:
    traffic = Traffic()
    closed_loop(traffic, 3, pictures=100)
    waited_s = traffic.waited_s
    assert waited_s > 0
    promised = traffic.ask(traffic.now_s + 0.05, budget_s=2 * UNLOADED_S)
    for n in range(3):
        traffic.ask(traffic.now_s + 0.1 + 0.1 * n)
    list(traffic.calls())
    assert promised.done_s is not None and promised.done_s <= promised.asked_s
    assert any(promised in batch for batch in traffic.mixed)


def test_clients_with_different_step_counts_join_between_steps() -> None:
    traffic, steps = Traffic(), random.Random(0)
    for _ in range(4):
        traffic.ask(0.0)
    for finished in traffic.calls():
        for _ in finished:
            if len(traffic.done) < 200:
                traffic.ask(traffic.now_s + 0.2, steps=steps.choice([1, 2, 4]))
    assert traffic.waited_s == 0.0


@pytest.mark.parametrize("joining", [True, False])
@pytest.mark.parametrize(
    ("fixed", "here", "waits"), [(0.45, 4, True), (0.05, 4, False), (0.05, 1, True), (0.0, 1, False)]
)
def test_the_wait_is_worth_the_calls_that_it_saves(fixed: float, here: int, waits: bool, joining: bool) -> None:
    """Whole-request batching never waits."""
    scheduler: StepScheduler[Request] = StepScheduler(shared_costs(fixed), 8, joining)
    for n in range(60):
        item = request(n, steps=K, now_s=10.0 * n)
        scheduler.admit([item], 10.0 * n)
        scheduler.remove(item)
        scheduler.answered(item, 10.0 * n + 9.99)
    for _ in range(7):
        scheduler.answered(item, 600.0)
    scheduler.admit([request(100 + n, steps=K, now_s=600.0) for n in range(here)], 600.0)
    assert (scheduler.wait_s(600.0) > 0) is (waits and joining)


def test_a_trial_of_a_larger_batch_takes_no_newcomer_along(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tdm_runtime.scheduling.cost_model.TRIAL_CALLS", 1)
    monkeypatch.setattr("tdm_runtime.scheduling.cost_model.MIN_GAIN", 0.3)  # half of the clients make a good batch
    traffic = Traffic(needs_text=False)
    closed_loop(traffic, 4, pictures=200)
    assert not any(batch[0].urgency[1] > 60 for batch in traffic.mixed)


@given(answers=st.lists(st.floats(0.0, 10.0), min_size=1), delay_s=st.floats(0.0, 1.0))
def test_who_is_expected_is_never_more_than_who_was_answered(answers: list[float], delay_s: float) -> None:
    returns = Returns()
    for at_s in sorted(answers):
        returns.answered(at_s)
    expected, wait_s = returns.expected(max(answers) + delay_s, window_s=0.5)
    assert 0 <= expected <= len(answers)
    assert wait_s <= 0.5


def test_a_share_of_clients_that_leave_is_seen() -> None:
    returns = Returns()
    for n in range(60):
        returns.answered(float(n))
        returns.arrived(n + 0.1, window_s=0.5)
    assert returns.are_usual
    assert returns.expected(60.0, 0.5) == (0, 0.0)
    returns.answered(60.0)
    expected, wait_s = returns.expected(60.0, 0.5)
    assert expected == 1 and wait_s == pytest.approx(0.1, abs=0.01)
    for n in range(61, 65):
        returns.answered(float(n))  # nobody comes back
    assert not returns.are_usual or returns.expected(70.0, 0.5) == (0, 0.0)
    assert not returns.are_usual
