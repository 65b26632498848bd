"""What is accepted and late is counted by its cause."""

from __future__ import annotations

import pytest

from serving.images.local import late_by
from tdm_runtime.engine.delivery import Delivery

DELIVERY = Delivery(latency_budget_ms=100.0, elapsed_ms=10.0, hand_over_ms=2.0, encoding_ms=5.0)


@pytest.mark.parametrize(
    ("calls_ms", "hand_over_ms", "total_ms", "cause"),
    [
        (83.0, 2.0, 100.0, None),
        (95.0, 2.0, 112.0, "calls"),
        (80.0, 20.0, 115.0, "hand-over"),
        (80.0, 2.0, 130.0, "encoding"),
        (90.0, 30.0, 135.0, "hand-over"),
        (120.0, 30.0, 165.0, "calls"),
    ],
)
def test_the_part_that_took_the_most_beyond_its_share_is_named(
    calls_ms: float, hand_over_ms: float, total_ms: float, cause: str | None
) -> None:
    assert late_by(DELIVERY, calls_ms, hand_over_ms, total_ms) == cause


def test_without_a_budget_nothing_is_late() -> None:
    assert late_by(Delivery(), 1e6, 1e6, 3e6) is None
