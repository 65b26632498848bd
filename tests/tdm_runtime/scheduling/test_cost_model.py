"""Laws of the cost model: estimates stay close to the measured calls."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdm_runtime.scheduling.cost_model import (
    AWAY_HALF_LIFE_S,
    CROWD,
    HALF_LIFE_S,
    MAX_SURPRISE,
    TRIAL_CALLS,
    CostModel,
    Kind,
)

STEP = Kind("denoise", (4, 8, 8))


def learned(seconds: dict[int, float]) -> CostModel:
    costs = CostModel()
    for size, each in seconds.items():
        costs.observe(STEP, size, each, 0.0)
    return costs


def test_a_kind_that_was_never_measured_costs_nothing_and_may_have_any_size() -> None:
    assert CostModel().seconds(STEP, 3) == 0.0
    assert CostModel().batch_size(STEP, 7) == 7


def test_unmeasured_sizes_are_interpolated_and_larger_ones_extrapolated_in_proportion() -> None:
    costs = learned({2: 4.0, 4: 6.0})
    assert [costs.seconds(STEP, size) for size in (1, 2, 3, 4, 8)] == [4.0, 4.0, 5.0, 6.0, 12.0]


def test_a_size_that_was_never_measured_takes_its_cost_from_the_nearest_measured_one() -> None:
    costs = learned({1: 1.0, 2: 1.5})
    costs.observe(STEP._replace(shape=(4, 80, 80)), 1, 100.0, 0.0)
    larger, smaller = STEP._replace(shape=(4, 16, 8)), STEP._replace(shape=(4, 4, 8))
    assert costs.seconds(larger) == pytest.approx(2.0**1.5) and costs.seconds(smaller) == pytest.approx(0.5**0.5)
    assert costs.batch_size(larger, 7) == costs.batch_size(STEP, 7)
    assert costs.deviation(larger) == costs.deviation(STEP)
    for other in (larger._replace(model="other"), larger._replace(stage="decode:full"), Kind("denoise", (4, 2, 8, 8))):
        assert costs.seconds(other) == 0.0
    costs.observe(larger, 1, 1.2, 0.0)
    assert costs.seconds(larger) == pytest.approx(1.2)


@given(st.lists(st.floats(0.5, 2.0), min_size=1, max_size=40))
def test_an_estimate_stays_in_the_range_of_measurements_and_a_margin_above_it(seen: list[float]) -> None:
    costs = CostModel()
    for seconds in seen:
        costs.observe(STEP, 1, seconds, 0.0)
    spread = max(seen) - min(seen)
    assert min(seen) - 1e-9 <= costs.seconds(STEP) <= max(seen) + spread + 1e-9


def test_an_estimate_follows_a_machine_that_became_slower() -> None:
    costs = learned({1: 1.0})
    for _ in range(60):
        costs.observe(STEP, 1, 2.0, 0.0)
    assert costs.seconds(STEP) == pytest.approx(2.0, rel=0.05)


def test_one_stall_of_the_machine_hardly_changes_the_estimate() -> None:
    costs = learned({1: 1.0})
    costs.observe(STEP, 1, 1000.0, 0.0)
    assert costs.seconds(STEP) < MAX_SURPRISE


@pytest.mark.parametrize(
    ("seconds", "available", "size"),
    [
        ({1: 1.0, 2: 2.0, 4: 4.0}, 4, 1),  # nothing is gained
        ({1: 1.0, 2: 1.96, 4: 3.9}, 4, 1),  # too little is gained
        ({1: 1.0, 2: 1.2, 4: 1.6}, 4, 4),
        ({1: 1.0, 2: 1.2, 4: 1.6}, 3, 3),
        ({1: 1.0, 2: 1.2, 4: 1.6, 8: 3.3}, 8, 4),  # beyond four samples it only takes longer
        ({1: 1.0, 2: 1.2, 3: 2.2, 4: 1.6}, 3, 2),  # three run as two and one
    ],
)
def test_a_batch_grows_only_while_throughput_rises(seconds: dict[int, float], available: int, size: int) -> None:
    assert learned(seconds).batch_size(STEP, available) == size


def test_without_a_limit_a_size_that_was_never_measured_is_tried() -> None:
    assert learned({1: 1.0}).batch_size(STEP, 6) == 6


def test_with_a_limit_only_measured_sizes_are_used() -> None:
    costs = learned({1: 1.0, 2: 1.5, 4: 2.0, 8: 3.0})
    costs.limit(STEP, 8)
    assert [costs.batch_size(STEP, available) for available in (1, 3, 5, 7, 8, 20)] == [1, 2, 4, 4, 8, 8]


def test_a_limit_holds_after_later_measurements() -> None:
    costs = learned({1: 1.0, 2: 1.1, 4: 1.2})
    costs.limit(STEP, 2)
    assert costs.batch_size(STEP, 4) == 2
    costs.observe(STEP, 4, 0.1, 0.0)
    assert costs.batch_size(STEP, 4) == 2
    costs.limit(STEP, 0)
    assert costs.batch_size(STEP, 4) == 1


# -- time ------------------------------------------------------------------------------------------

QUICK_S = 0.005
"""Seconds of a call that is short enough for the shortest half-life."""
CALLS = st.lists(
    st.tuples(st.sampled_from([1, 2, 8]), st.floats(0.1, 50.0), st.floats(0.0, 100.0), st.booleans()), max_size=40
)


def after(calls: list[tuple[int, float, float, bool]]) -> tuple[CostModel, float]:
    """Return costs after a warm-up and some calls, and the time at the end.

    A call is (size, duration in times of the usual, seconds since the call before, calm).
    """
    costs, now_s = CostModel(), 0.0
    for size in (1, 2, 8):
        costs.observe(STEP, size, size * QUICK_S, now_s)
    for size, factor, pause_s, is_calm in calls:
        now_s += pause_s
        costs.observe(STEP, size, factor * size * QUICK_S, now_s, is_calm)
    return costs, now_s


@given(calls=CALLS, pauses=st.lists(st.floats(0.0, 1000.0), min_size=1, max_size=5))
def test_without_calls_costs_only_fall_even_if_the_clock_goes_back(
    calls: list[tuple[int, float, float, bool]], pauses: list[float]
) -> None:
    costs, now_s = after(calls)
    last = costs.seconds(STEP), costs.deviation(STEP)
    back = costs.at(now_s - 1000.0)
    assert (back.seconds(STEP), back.deviation(STEP)) == last, "a clock that goes back changes nothing"
    for pause_s in pauses:
        now_s += pause_s
        costs.pass_time(now_s)
        assert 0 < costs.seconds(STEP) <= last[0] * (1 + 1e-9) and 0 <= costs.deviation(STEP) <= last[1]
        last = costs.seconds(STEP), costs.deviation(STEP)
    assert costs.least().seconds(STEP) <= min(QUICK_S, last[0]) * (1 + 1e-9)


@given(calls=CALLS)
def test_what_load_taught_is_forgotten_after_a_second(calls: list[tuple[int, float, float, bool]]) -> None:
    storm = [(size, factor, min(pause_s, 0.1), False) for size, factor, pause_s, _ in calls]
    costs, now_s = after(storm)
    costs.pass_time(now_s + 1.0)
    assert costs.seconds(STEP) <= 1.001 * QUICK_S
    assert costs.deviation(STEP) < 0.001


def test_a_busy_engine_forgets_nothing_between_calls() -> None:
    costs, now_s = after([(1, 3.0, QUICK_S, False)] * 60)
    assert costs.seconds(STEP) == pytest.approx(3 * QUICK_S, rel=0.02)
    assert costs.at(now_s + HALF_LIFE_S / 10).seconds(STEP) == pytest.approx(3 * QUICK_S, rel=0.03)


def test_calls_of_other_kinds_in_between_make_the_engine_forget_little() -> None:
    """A batch of many samples takes long, so under load the calls of one kind are far apart."""
    decode = Kind("decode:full", STEP.shape)
    costs, now_s = after([])
    costs.observe(decode, 32, 0.2, now_s)
    for _ in range(60):
        for kind, size, usual_s in ((STEP, 1, QUICK_S), (decode, 32, 0.2), (decode, 32, 0.2)):
            costs.began(now_s)
            now_s += 3 * usual_s
            costs.ended()
            costs.observe(kind, size, 3 * usual_s, now_s)
    costs.began(now_s)
    assert costs.at(now_s + 0.6).seconds(STEP) == pytest.approx(3 * QUICK_S, rel=0.15), "while a call runs"
    assert costs.at(now_s + 4 * AWAY_HALF_LIFE_S).seconds(STEP) == pytest.approx(QUICK_S, rel=0.01), "not for ever"


def test_slow_calls_are_remembered_for_longer() -> None:
    """A pause as long as a call makes the engine forget nothing."""
    costs, now_s = CostModel(), 0.0
    costs.observe(STEP, 1, 5.0, now_s)
    for _ in range(40):
        now_s += 10.0
        costs.observe(STEP, 1, 10.0, now_s)
    assert costs.at(now_s + 10.0).seconds(STEP) == pytest.approx(10.0, rel=0.05)


def test_a_lone_client_every_few_minutes_teaches_that_the_machine_is_slower() -> None:
    costs, now_s = after([(1, 2.0, 300.0, True)] * 60)
    assert costs.at(now_s + 300.0).seconds(STEP) == pytest.approx(2 * QUICK_S, rel=0.1)


def test_repeated_storms_do_not_accumulate() -> None:
    costs, now_s = after(([(1, 4.0, QUICK_S, False)] * 30 + [(1, 4.0, 1.0, False)]) * 20)
    costs.pass_time(now_s + 1.0)
    assert costs.seconds(STEP) == pytest.approx(QUICK_S, rel=0.01)


@pytest.mark.parametrize("storms", [1, 20])
def test_calls_beside_many_samples_cost_what_they_cost_beside_as_many_the_last_time(storms: int) -> None:
    costs, now_s = after([])
    for _ in range(storms):
        now_s += 60.0
        costs.pass_time(now_s, 2 * CROWD)
        for number in range(30):
            now_s += 1.5 * QUICK_S
            costs.observe(STEP, 1, (1.7 if number % 2 else 1.3) * QUICK_S, now_s)
        now_s += 60.0
        costs.pass_time(now_s, 1)
        costs.observe(STEP, 1, QUICK_S, now_s, is_calm=True)
    for present, slowness in ((CROWD - 1, 1.0), (CROWD, 1.0), (2 * CROWD, 1.5), (64 * CROWD, 1.5)):
        costs.pass_time(now_s, present)
        assert costs.seconds(STEP) == pytest.approx(slowness * QUICK_S, rel=0.05)
    assert costs.deviation(STEP) == pytest.approx(0.13, abs=0.04)
    costs.pass_time(now_s)
    assert costs.seconds(STEP) == pytest.approx(QUICK_S, rel=0.05), "a lone sample after the storm"


def test_a_size_that_was_measured_in_a_slow_moment_is_tried_until_it_is_known_to_be_good() -> None:
    true_s = {1: 1.0, 2: 1.5, 4: 2.5, 8: 4.5}
    costs = learned(true_s | {8: 1.15 * true_s[8]})
    costs.limit(STEP, 8)
    assert costs.batch_size(STEP, 8) == 4
    made = [0, 0]
    for n in range(2000):
        tried = costs.trial_size(STEP, 8)
        size = tried or costs.batch_size(STEP, 8)
        made[n // 1000] += size == 8
        costs.observe(STEP, size, true_s[size], float(n))
    assert costs.batch_size(STEP, 8) == 8
    assert made[1] > 900


def test_a_size_that_is_known_to_be_bad_is_seldom_tried_and_a_hopeless_one_never() -> None:
    for factor, most in ((1.1, 1000 // TRIAL_CALLS + 1), (2.0, 0)):
        costs = learned({1: 1.0, 2: factor * 2.0})
        costs.limit(STEP, 2)
        tried = 0
        for n in range(1000):
            size = costs.trial_size(STEP, 2) or costs.batch_size(STEP, 2)
            tried += size == 2
            costs.observe(STEP, size, factor * 2.0 if size == 2 else 1.0, float(n))
        assert (tried > 0) == (most > 0)
        assert tried <= most


def test_sizes_that_were_never_measured_are_not_tried() -> None:
    assert CostModel().trial_size(STEP, 8) is None
    assert learned({1: 1.0}).trial_size(Kind("denoise", (4, 16, 16)), 8) is None
