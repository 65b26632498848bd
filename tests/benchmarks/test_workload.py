"""Laws of requests and of their arrival times."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.workload import Workload, arrival_times, arrivals_within

rates = st.floats(0.01, 1000)
shapes = st.floats(0.05, 20)
seeds = st.integers(0, 2**32)
quick = settings(deadline=None, max_examples=25)


@quick
@given(rates, shapes, seeds, st.integers(1, 200))
def test_a_seed_gives_one_rising_schedule_and_a_longer_one_starts_the_same(
    rate: float, shape: float, seed: int, count: int
):
    times = arrival_times(count, rate, shape, seed)
    assert times == arrival_times(count, rate, shape, seed)
    assert times == sorted(times) and times[0] >= 0
    assert arrival_times(count + 7, rate, shape, seed)[:count] == times


@quick
@given(rates, shapes, seeds)
def test_the_schedule_scales_with_the_rate(rate: float, shape: float, seed: int):
    once, twice = arrival_times(20, rate, shape, seed), arrival_times(20, 2 * rate, shape, seed)
    assert np.allclose(np.array(once), 2 * np.array(twice))


@quick
@given(rates, st.sampled_from([0.25, 0.5, 1.0, 4.0]), seeds)
def test_gaps_have_the_mean_of_the_rate_and_the_variance_of_the_burstiness(rate: float, shape: float, seed: int):
    gaps = np.diff([0.0, *arrival_times(20_000, rate, shape, seed)])
    assert gaps.mean() == pytest.approx(1 / rate, rel=0.1)
    # The squared coefficient of variation of a gamma distribution is 1 / shape: 1 for a Poisson process.
    assert (gaps.std() / gaps.mean()) ** 2 == pytest.approx(1 / shape, rel=0.25)


@quick
@given(st.floats(0.1, 50), shapes, seeds, st.floats(0.1, 5))
def test_a_duration_cuts_off_the_same_schedule(rate: float, shape: float, seed: int, duration_s: float):
    within = arrivals_within(duration_s, rate, shape, seed)
    longer = arrival_times(len(within) + 1, rate, shape, seed)
    assert within == longer[:-1] and longer[-1] > duration_s


def test_an_infinite_rate_puts_all_arrivals_at_0():
    assert arrival_times(5, math.inf) == [0.0] * 5


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan])
def test_a_rate_that_is_not_positive_is_refused(rate: float):
    with pytest.raises(ValueError, match="must be above 0"):
        arrival_times(5, rate)


@pytest.mark.parametrize("burstiness", [0.0, -1.0, math.inf])
def test_a_burstiness_that_is_not_positive_is_refused(burstiness: float):
    with pytest.raises(ValueError, match="burstiness"):
        arrival_times(5, 1.0, burstiness)


@quick
@given(seeds)
def test_a_seed_gives_one_workload_and_no_prompt_twice(seed: int):
    workload = Workload(seed, steps=(1, 4, "auto"), sizes=((64, 64), (96, 64)))
    first = list(itertools.islice(workload.requests(), 80))
    assert first == list(itertools.islice(workload.requests(), 80))
    assert len({request.prompt for request in first}) == 80
    assert {request.num_inference_steps for request in first} == {1, 4, "auto"}
    assert {request.size for request in first} == {(64, 64), (96, 64)}


@quick
@given(seeds)
def test_another_mixture_keeps_the_seeds(seed: int):
    mixed, fixed = (Workload(seed, steps=steps).requests() for steps in [(1, 2, 3, 4), (4,)])
    assert [r.seed for r in itertools.islice(mixed, 50)] == [r.seed for r in itertools.islice(fixed, 50)]
