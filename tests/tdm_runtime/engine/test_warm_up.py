"""How many samples a call is measured with at warm-up, on a machine that has slow moments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tdm_runtime.engine import warm_up
from tdm_runtime.engine.engine import EngineConfig
from tdm_runtime.scheduling.cost_model import CostModel, Kind

STEP = Kind("denoise", (4, 8, 8), "a model")


class Clock:
    """Stands in for the module `time`. Calls of the model pass its time."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s


class CountingEngine:
    """Runs calls at once and keeps what they teach."""

    config = EngineConfig(max_batch_size=32)

    def __init__(self) -> None:
        self.costs = CostModel()

    def run_on_thread(self, work: Callable[[], object]) -> None:
        work()

    def observe(self, kind: Kind, size: int, seconds: float) -> None:
        self.costs.observe(kind, size, seconds, 0.0)

    def limit(self, kind: Kind, size: int) -> None:
        self.costs.limit(kind, size)


@pytest.fixture
def learned_size(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Return a function that warms up and returns the size of a call when 32 samples wait."""

    def learn(seconds: Callable[[int], float], begins_s: float = 0.0, ends_s: float = 0.0, factor: float = 1.0) -> int:
        clock = Clock()
        engine: Any = CountingEngine()
        monkeypatch.setattr(warm_up, "time", clock)

        def call(size: int) -> None:
            clock.now_s += seconds(size) * (factor if begins_s <= clock.now_s < ends_s else 1.0)

        warm_up._learn(engine, STEP, call)
        return engine.costs.batch_size(STEP, 32)

    return learn


def fixed_cost(size: int) -> float:
    return 0.004 + 0.005 * size


def test_sizes_grow_while_they_make_more_samples_a_second(learned_size: Callable[..., int]) -> None:
    assert learned_size(fixed_cost) == 16
    assert learned_size(lambda size: 0.01 * size) == 1
    assert learned_size(lambda size: 0.01 * max(1.0, size / 4)) == 4


@pytest.mark.parametrize("begins_s", [0.01, 0.03, 0.06, 0.1, 0.15])
@pytest.mark.parametrize(("lasts_s", "factor"), [(0.1, 1.8), (0.2, 1.8), (0.05, 0.6), (0.1, 0.6)])
def test_a_slow_or_fast_moment_of_the_machine_changes_no_size(
    learned_size: Callable[..., int], begins_s: float, lasts_s: float, factor: float
) -> None:
    assert learned_size(fixed_cost, begins_s, begins_s + lasts_s, factor) == 16
