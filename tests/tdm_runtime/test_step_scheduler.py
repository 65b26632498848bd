"""Laws of the choice among live samples, under any order of arrivals, steps and departures."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tdm_runtime.step_scheduler import StepScheduler


@dataclass(eq=False)
class Work:
    """A sample as the scheduler sees it, and how far it came."""

    bucket: int
    urgency: tuple[float, int]
    steps: int
    taken: int = 0
    has_left: bool = False

    @property
    def remaining(self) -> int:
        return self.steps - self.taken


class AnyTraffic(RuleBasedStateMachine):
    """Samples arrive, take steps together and leave, finished or not."""

    @initialize(capacity=st.integers(1, 5))
    def open(self, capacity: int) -> None:
        self.scheduler: StepScheduler[Work] = StepScheduler(capacity)
        self.accepted: list[Work] = []

    @property
    def live(self) -> list[Work]:
        return [work for work in self.accepted if not work.has_left]

    def steps_ahead(self, work: Work) -> int:
        """Steps that it and all that are more urgent still have to take."""
        return sum(other.remaining for other in self.live if other.urgency <= work.urgency)

    @rule(bucket=st.integers(0, 2), deadline_s=st.sampled_from([0.0, 1.0, 2.0]), steps=st.integers(1, 4))
    def arrive(self, bucket: int, deadline_s: float, steps: int) -> None:
        work = Work(bucket, (deadline_s, len(self.accepted)), steps)
        self.scheduler.add(work)
        self.accepted.append(work)

    @precondition(lambda self: self.live)
    @rule(choice=st.randoms(use_true_random=False))
    def cancel(self, choice: object) -> None:
        self.leave(choice.choice(self.live))  # type: ignore[attr-defined]

    @rule()
    def step(self) -> None:
        live, ahead = self.live, {work: self.steps_ahead(work) for work in self.live}
        batch = self.scheduler.schedule()
        assert len(batch) == len(set(batch)) <= self.scheduler.max_batch_size
        assert set(batch) <= set(live)
        assert len({work.bucket for work in batch}) <= 1
        if not live:
            return
        most_urgent = min(live, key=lambda work: work.urgency)
        assert batch[0] is most_urgent
        assert [work.urgency for work in batch] == sorted(work.urgency for work in batch)
        peers = sorted((w for w in live if w.bucket == most_urgent.bucket), key=lambda work: work.urgency)
        assert batch == peers[: len(batch)], "a less urgent sample of the bucket went first"
        assert len(batch) == min(len(peers), self.scheduler.max_batch_size), "a place stayed empty"
        for work in batch:
            work.taken += 1
            assert work.taken <= work.steps
        for work in batch:
            if not work.remaining:
                self.leave(work)
        for work in self.live:  # so none waits longer than the work that was ahead of it
            assert self.steps_ahead(work) < ahead[work]

    @invariant()
    def live_samples_are_known_in_order_of_urgency(self) -> None:
        assert self.scheduler.live() == sorted(self.live, key=lambda work: work.urgency)
        assert len(self.scheduler) == len(self.live)

    def leave(self, work: Work) -> None:
        self.scheduler.remove(work)
        work.has_left = True

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for _ in range(sum(work.remaining for work in self.live)):
            self.step()
        assert not self.live and self.scheduler.schedule() == []


AnyTraffic.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAnyTraffic = AnyTraffic.TestCase


@given(
    arrivals=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5), st.integers(1, 4)), max_size=12),
    capacity=st.integers(1, 4),
)
def test_every_sample_takes_each_of_its_steps_exactly_once(arrivals: list[tuple[int, int, int]], capacity: int) -> None:
    scheduler: StepScheduler[Work] = StepScheduler(capacity)
    works = [Work(bucket, (deadline_s, n), steps) for n, (bucket, deadline_s, steps) in enumerate(arrivals)]
    for work in works:
        scheduler.add(work)
    taken: list[tuple[int, int]] = []
    while batch := scheduler.schedule():
        for work in batch:
            taken.append((work.urgency[1], work.taken))
            work.taken += 1
            if not work.remaining:
                scheduler.remove(work)
    assert sorted(taken) == [(n, step) for n, (_, _, steps) in enumerate(arrivals) for step in range(steps)]


def test_a_later_deadline_waits_for_an_earlier_one_whatever_came_first() -> None:
    scheduler: StepScheduler[Work] = StepScheduler(1)
    late, soon = Work(0, (9.0, 0), 1), Work(0, (3.0, 1), 1)
    scheduler.add(late)
    scheduler.add(soon)
    assert scheduler.schedule() == [soon]
    scheduler.remove(soon)
    assert scheduler.schedule() == [late]


def test_scheduling_alone_changes_nothing() -> None:
    scheduler: StepScheduler[Work] = StepScheduler(2)
    for n in range(3):
        scheduler.add(Work(0, (0.0, n), 1))
    assert scheduler.schedule() == scheduler.schedule()


def test_nothing_live_is_an_empty_batch() -> None:
    assert StepScheduler[Work](3).schedule() == []


def test_a_sample_joins_once() -> None:
    scheduler: StepScheduler[Work] = StepScheduler(1)
    work = Work(0, (0.0, 0), 1)
    scheduler.add(work)
    with pytest.raises(AssertionError, match="unique"):
        scheduler.add(work)
    assert scheduler.live() == [work]


def test_a_sample_that_is_not_live_cannot_leave() -> None:
    with pytest.raises(KeyError):
        StepScheduler[Work](1).remove(Work(0, (0.0, 0), 1))


@pytest.mark.parametrize("capacity", [0, -1])
def test_a_batch_holds_at_least_one_sample(capacity: int) -> None:
    with pytest.raises(ValueError, match=f"max_batch_size is {capacity}"):
        StepScheduler(capacity)


def test_the_scheduler_knows_no_tensors() -> None:
    code = "import sys, tdm_runtime.step_scheduler; print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
