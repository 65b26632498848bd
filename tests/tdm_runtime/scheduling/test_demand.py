"""Laws of demand: requests that arrive by chance are all counted, a client that waits for its answers never."""

from __future__ import annotations

import random

import pytest

from tdm_runtime.scheduling.demand import Demand, MovingRate

WINDOW_S = 50.0


def seen(arrivals: list[float], service_s: float) -> tuple[float, float]:
    """Return the demand, and the share of busy time, after requests that one server works off in order."""
    demand, busy, free_s = Demand(), MovingRate(), 0.0
    for now_s in arrivals:
        demand.add(1, now_s < free_s, now_s, WINDOW_S)
        began_s = max(now_s, free_s)
        busy.add(service_s, began_s, WINDOW_S)
        free_s = began_s + service_s
    share = min(1.0, busy.per_second(arrivals[-1], WINDOW_S))
    return demand.per_second(arrivals[-1], WINDOW_S, share), share


@pytest.mark.parametrize("load", [0.2, 0.6, 0.9])
def test_requests_that_arrive_by_chance_are_counted_whether_or_not_they_wait(load: float) -> None:
    drawn, now_s, arrivals = random.Random(1), 0.0, []
    while now_s < 10 * WINDOW_S:
        now_s += drawn.expovariate(20.0)
        arrivals.append(now_s)
    demand, share = seen(arrivals, load / 20.0)
    assert share == pytest.approx(load, rel=0.15)
    assert demand == pytest.approx(20.0, rel=0.15)


def test_a_client_that_waits_for_its_answers_is_no_demand() -> None:
    demand, share = seen([0.1 * n for n in range(5000)], 0.0999)
    assert share > 0.9 and demand == 0.0


def test_two_requests_at_once_now_and_then_are_not_taken_for_many() -> None:
    arrivals = [10.0 * (n // 2) for n in range(100)]
    demand, share = seen(arrivals, 0.01)
    assert share < 0.01 and demand <= 0.25


def test_an_engine_that_never_ran_has_no_demand() -> None:
    assert Demand().per_second(0.0, WINDOW_S, busy=0.0) == 0.0
