"""What calls cost: learned from what was seen, and no more claimed than that."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdm_runtime.scheduling.cost_model import MAX_SURPRISE, CostModel, Kind

STEP = Kind("denoise", (4, 8, 8))


def learned(seconds: dict[int, float]) -> CostModel:
    costs = CostModel()
    for size, each in seconds.items():
        costs.observe(STEP, size, each)
    return costs


def test_what_was_never_seen_costs_nothing_and_may_be_any_size() -> None:
    assert CostModel().seconds(STEP, 3) == 0.0
    assert CostModel().batch_size(STEP, 7) == 7


def test_sizes_between_lie_on_the_line_and_beyond_in_proportion() -> None:
    costs = learned({2: 4.0, 4: 6.0})
    assert [costs.seconds(STEP, size) for size in (1, 2, 3, 4, 8)] == [4.0, 4.0, 5.0, 6.0, 12.0]


@given(st.lists(st.floats(0.5, 2.0), min_size=1, max_size=40))
def test_an_estimate_stays_within_what_was_seen_and_its_caution_above_it(seen: list[float]) -> None:
    costs = CostModel()
    for seconds in seen:
        costs.observe(STEP, 1, seconds)
    spread = max(seen) - min(seen)
    assert min(seen) - 1e-9 <= costs.seconds(STEP) <= max(seen) + spread + 1e-9


def test_it_follows_a_machine_that_changed() -> None:
    costs = learned({1: 1.0})
    for _ in range(60):
        costs.observe(STEP, 1, 2.0)
    assert costs.seconds(STEP) == pytest.approx(2.0, rel=0.05)


def test_one_stall_is_not_the_models_cost() -> None:
    costs = learned({1: 1.0})
    costs.observe(STEP, 1, 1000.0)
    assert costs.seconds(STEP) < MAX_SURPRISE


@pytest.mark.parametrize(
    ("seconds", "available", "size"),
    [
        ({1: 1.0, 2: 2.0, 4: 4.0}, 4, 1),  # nothing is gained
        ({1: 1.0, 2: 1.96, 4: 3.9}, 4, 1),  # too little is gained
        ({1: 1.0, 2: 1.2, 4: 1.6}, 4, 4),
        ({1: 1.0, 2: 1.2, 4: 1.6}, 3, 3),
        ({1: 1.0, 2: 1.2, 4: 1.6, 8: 3.3}, 8, 4),  # beyond four it only takes longer
        ({1: 1.0, 2: 1.2, 3: 2.2, 4: 1.6}, 3, 2),  # as where three run as two and one
    ],
)
def test_a_batch_grows_only_while_more_a_second_come_of_it(
    seconds: dict[int, float], available: int, size: int
) -> None:
    assert learned(seconds).batch_size(STEP, available) == size


def test_a_size_that_was_never_tried_is_tried() -> None:
    assert learned({1: 1.0}).batch_size(STEP, 6) == 6


def test_where_all_that_helps_was_tried_nothing_else_is() -> None:
    costs = learned({1: 1.0, 2: 1.5, 4: 2.0, 8: 3.0})
    costs.limit(STEP, 8)
    assert [costs.batch_size(STEP, available) for available in (1, 3, 5, 7, 8, 20)] == [1, 2, 4, 4, 8, 8]


def test_a_limit_holds_whatever_is_learned() -> None:
    costs = learned({1: 1.0, 2: 1.1, 4: 1.2})
    costs.limit(STEP, 2)
    assert costs.batch_size(STEP, 4) == 2
    costs.observe(STEP, 4, 0.1)
    assert costs.batch_size(STEP, 4) == 2
    costs.limit(STEP, 0)
    assert costs.batch_size(STEP, 4) == 1
