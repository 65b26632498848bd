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

    def learn(seconds: Callable[[int], float], slow_until_s: float = 0.0, slowness: float = 1.0) -> int:
        clock, engine = Clock(), CountingEngine()
        monkeypatch.setattr(warm_up, "time", clock)

        def call(size: int) -> None:
            clock.now_s += seconds(size) * (slowness if size > 1 and clock.now_s < slow_until_s else 1.0)

        warm_up._learn(cast_engine(engine), STEP, call)
        return engine.costs.batch_size(STEP, 32)

    return learn


def cast_engine(engine: CountingEngine) -> Any:
    return engine


def fixed_cost(size: int) -> float:
    return 0.004 + 0.005 * size


def test_sizes_grow_while_they_make_more_samples_a_second(learned_size: Callable[..., int]) -> None:
    assert learned_size(fixed_cost) == 16
    assert learned_size(lambda size: 0.01 * size) == 1
    assert learned_size(lambda size: 0.01 * max(1.0, size / 4)) == 4


@pytest.mark.parametrize("slow_until_s", [0.2, 0.5])
def test_a_slow_moment_does_not_end_the_growth(learned_size: Callable[..., int], slow_until_s: float) -> None:
    """Larger sizes first look as if they gave nothing; measured again, they do."""
    assert learned_size(fixed_cost, slow_until_s, 1.8) == 16
