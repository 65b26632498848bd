"""Discrete-event simulation of replicas behind a router. Each replica runs the scheduler that the engine runs.

Nothing is computed and no time passes: a call ends after the seconds of the cost table, with chance deviations. The
result is a `Recording`, as of a real run, so that both are summarised by the same code.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import numpy as np

from benchmarks.load import Record, Recording
from benchmarks.plan.cost_table import CostTable, cost_model
from benchmarks.targets import Outcome
from benchmarks.workload import Request
from tdm_runtime.engine.engine import EngineConfig
from tdm_runtime.errors import OverloadedError, TDMError
from tdm_runtime.scheduling.scheduler import StepScheduler
from tdm_runtime.scheduling.work import Lane, Work

Policy = Literal["joining", "whole-requests", "fifo"]
"""`joining`: this project's scheduler. The others are what servers without one do, with the default step count and
without budgets: `whole-requests` batches requests that start and end together, `fifo` runs one after the other."""
Route = Literal["least-work", "two-choices", "round-robin"]
"""`least-work`: the replica with the least predicted seconds of work. `two-choices`: of two replicas drawn by chance
the one with fewer requests, as Ray Serve routes. `round-robin`: in turns."""
SCALING_S = 1.0
"""Seconds between two decisions of the autoscaler."""


@dataclass(frozen=True)
class Fleet:
    """Replicas and what happens to them."""

    replicas: int = 1
    """Replicas at the start, and the fewest."""
    most_replicas: int | None = None
    """Most replicas of the autoscaler; None runs none."""
    target_ongoing: float = 4.0
    """Requests in a replica that the autoscaler aims at, as Ray Serve's `target_ongoing_requests`."""
    start_s: float = 30.0
    """Seconds from the start of a replica to its first request."""
    idle_s: float = 60.0
    """Seconds for which fewer replicas must be enough before the autoscaler stops one."""
    failures_per_hour: float = 0.0
    """Failures of a replica per hour. It comes back after `start_s`; its requests go to the others, from the start."""
    policy: Policy = "joining"
    route: Route = "least-work"
    engine: EngineConfig = EngineConfig()

    def __post_init__(self) -> None:
        if self.replicas < 1:
            raise ValueError(f"replicas is {self.replicas}; it must be at least 1")
        if self.most_replicas is not None and self.most_replicas < self.replicas:
            raise ValueError(f"at most {self.most_replicas} replicas are fewer than the {self.replicas} at the start")


@dataclass
class Result:
    """Answers of a simulation, and what the fleet needed."""

    recording: Recording = field(default_factory=Recording)
    replica_s: float = 0.0
    """Seconds of all replicas together, those of starting ones included."""
    busy_s: float = 0.0
    """Seconds of all calls together."""
    most_replicas: int = 0
    late: int = 0
    """Budgets that were accepted and missed."""


@dataclass(frozen=True)
class _Asked:
    """A request on its way."""

    table: CostTable
    """Its model."""
    request: Request
    arrived_s: float


@dataclass(eq=False, kw_only=True)
class _Task(Work):
    """A request in a replica."""

    asked: _Asked
    steps_taken: int = 0


class _Replica:
    """One engine: a scheduler, what it believes of the costs, and at most one running call."""

    def __init__(self, tables: Sequence[CostTable], fleet: Fleet, first_call: int) -> None:
        """
        Args:
            first_call: Place in the tables' `paces` at which this replica begins.
        """
        config = fleet.engine
        if fleet.policy == "fifo":
            config = replace(config, max_batch_size=1, patience=1.0)
        self.config = config
        self.costs = cost_model(tables)
        self.scheduler: StepScheduler[_Task] = StepScheduler(
            self.costs, config.max_batch_size, fleet.policy == "joining"
        )
        self.running: list[_Task] = []
        self.is_stopping = False
        self.is_lost = False
        self._num_calls = itertools.count(first_call)

    def pace(self, table: CostTable, rng: np.random.Generator) -> float:
        """Return the duration of the next call as a multiple of its cost."""
        if table.paces:
            return table.paces[next(self._num_calls) % len(table.paces)]
        # The mean of |pace - 1| is the deviation, and that of the pace is 1, while deviations are small.
        sigma = table.deviation * math.sqrt(math.pi / 2)
        return math.exp(rng.normal(0.0, sigma) - sigma**2 / 2)

    def admit(self, task: _Task, now_s: float) -> None:
        """Accept a request.

        Raises:
            TDMError: As the engine.
        """
        if len(self.scheduler) >= self.config.max_live:
            raise OverloadedError("the queue is full", retry_after_s=max(0.1, 0.5 * self.scheduler.backlog_s()))
        self.scheduler.admit([task], now_s)


class Simulation:
    """One run over a list of arrivals."""

    def __init__(
        self, tables: Sequence[CostTable], fleet: Fleet, shares: Sequence[float] | None = None, seed: int = 0
    ) -> None:
        """
        Args:
            tables: Models that every replica serves.
            shares: Share of each model in the requests; equal shares by default.
        """
        self._tables = tables
        self._shares = None if shares is None else np.asarray(shares) / sum(shares)
        self._fleet = fleet
        self._truth = cost_model(tables)
        self._rng = np.random.default_rng(seed)
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = itertools.count()
        self._turns = itertools.count()
        self._replicas: list[_Replica] = []
        self._all: list[_Replica] = []
        self._starting = 0
        self._enough_since_s = 0.0
        self._counted_s = 0.0
        self._open = 0
        self.result = Result(most_replicas=fleet.replicas)

    def run(self, arrivals: Sequence[float], requests: Iterable[Request]) -> Result:
        """Send each request at its time and run until all are answered.

        Args:
            arrivals: seconds since the start, in rising order.
        """
        for request, arrived_s in zip(requests, arrivals, strict=False):
            table = self._tables[self._rng.choice(len(self._tables), p=self._shares)]
            self._open += 1
            self._at(arrived_s + table.front_s / 2, partial(self._send, _Asked(table, request, arrived_s)))
        if self._fleet.most_replicas is not None:
            self._at(SCALING_S, self._scale)
        for _ in range(self._fleet.replicas):
            self._add_replica(0.0)
        while self._open:
            now_s, _, happens = heapq.heappop(self._events)
            self._count_replicas(now_s)
            happens(now_s)
        self.result.late = sum(one.scheduler.num_late for one in self._all)
        return self.result

    def _at(self, when_s: float, happens: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (when_s, next(self._order), happens))

    def _count_replicas(self, now_s: float) -> None:
        there = len(self._replicas) + self._starting
        self.result.replica_s += there * (now_s - self._counted_s)
        self.result.most_replicas = max(self.result.most_replicas, there)
        self._counted_s = now_s

    # -- requests -----------------------------------------------------------------------------

    def _send(self, asked: _Asked, now_s: float) -> None:
        ready = [one for one in self._replicas if not one.is_stopping]
        if not ready:
            self._answer(asked, Outcome(0.0, "no_replica", True), now_s)
            return
        replica = self._routed(ready)
        try:
            replica.admit(self._task(asked, replica, now_s), now_s)
        except TDMError as error:
            self._answer(asked, Outcome(0.0, type(error).__name__, True), now_s)
        else:
            self._call(replica, now_s)

    def _routed(self, ready: Sequence[_Replica]) -> _Replica:
        if len(ready) == 1:
            return ready[0]
        if self._fleet.route == "round-robin":
            return ready[next(self._turns) % len(ready)]
        if self._fleet.route == "two-choices":
            pair = [ready[int(index)] for index in self._rng.choice(len(ready), 2, replace=False)]
            return min(pair, key=lambda one: len(one.scheduler))
        return min(ready, key=lambda one: one.scheduler.backlog_s())

    def _task(self, asked: _Asked, replica: _Replica, now_s: float) -> _Task:
        """Return a request as the engine takes it in (`Intake.sample`)."""
        table, request = asked.table, asked.request
        size, steps = table.size(request.size), request.num_inference_steps
        is_ours = self._fleet.policy == "joining"
        open_steps: tuple[int, ...] = ()
        if steps == "auto":
            fewest = request.min_inference_steps or 1
            open_steps = tuple(n for n in table.step_counts if n >= fewest) if is_ours else ()
            steps = table.step_counts[-1] if is_ours else None
        task = _Task(
            denoise=Lane(table.denoise(size)),
            decode=Lane(table.decode(size)),
            steps_left=steps or table.steps,
            urgency=(now_s, next(self._order)),
            open_steps=open_steps,
            needs_text=True,
            text=table.text,
            asked=asked,
            elapsed_s=now_s - asked.arrived_s,
            hand_over_s=table.front_s / 2,
            encoding_s=table.encode_s,
        )
        budget_s = 1e-3 * request.latency_budget_ms if request.latency_budget_ms and is_ours else None
        replica.costs.pass_time(now_s, len(replica.scheduler) + 1)
        task.set_deadlines(replica.costs, now_s, budget_s, replica.config.patience, replica.config.auto_stretch)
        if open_steps:
            task.steps_left = open_steps[0]
        return task

    def _answer(self, asked: _Asked, outcome: Outcome, now_s: float) -> None:
        answered_s = now_s + asked.table.front_s / 2
        outcome, sent_s = replace(outcome, answered_s=answered_s), asked.arrived_s
        self.result.recording.records.append(Record(asked.request, sent_s, sent_s, answered_s, outcome))
        self._open -= 1

    # -- calls --------------------------------------------------------------------------------

    def _call(self, replica: _Replica, now_s: float) -> None:
        """Begin the next call of a replica that makes none."""
        if replica.running:
            return
        replica.running = batch = replica.scheduler.schedule(now_s)
        if not batch:
            if replica.is_stopping:
                self._replicas.remove(replica)
            return
        overhead_s = 0.0
        for task in batch:
            if not task.needs_text and not task.has_started:
                task.steps_taken = task.steps_left
                overhead_s += task.asked.table.overhead_s
        kind = batch[0].call_kind
        seconds = self._truth.seconds(kind, len(batch)) * replica.pace(batch[0].asked.table, self._rng)
        began_s = now_s + overhead_s
        self._at(began_s + seconds, partial(self._end_call, replica, began_s))

    def _end_call(self, replica: _Replica, began_s: float, now_s: float) -> None:
        if replica.is_lost:
            return
        batch, replica.running = replica.running, []
        kind, is_calm = batch[0].call_kind, replica.scheduler.is_calm(began_s)
        replica.scheduler.end_call()
        replica.costs.observe(kind, len(batch), now_s - began_s, now_s, is_calm)
        self.result.busy_s += now_s - began_s
        for task in batch:
            if task.advance():
                replica.scheduler.remove(task)
                done = Outcome(0.0, steps_used=task.steps_taken)
                self._at(now_s + task.asked.table.encode_s, partial(self._answer, task.asked, done))
        self._call(replica, now_s)

    # -- replicas -----------------------------------------------------------------------------

    def _add_replica(self, now_s: float) -> None:
        replica = _Replica(self._tables, self._fleet, int(self._rng.integers(1 << 32)))
        self._replicas.append(replica)
        self._all.append(replica)
        if rate := self._fleet.failures_per_hour / 3600:
            self._at(now_s + self._rng.exponential(1 / rate), partial(self._fail, replica))

    def _fail(self, replica: _Replica, now_s: float) -> None:
        if replica not in self._replicas:
            return
        replica.is_lost = True
        self._replicas.remove(replica)
        self._start(now_s)
        for task in replica.scheduler.live():
            self._send(task.asked, now_s)

    def _start(self, now_s: float) -> None:
        self._starting += 1
        self._at(now_s + self._fleet.start_s, self._started)

    def _started(self, now_s: float) -> None:
        self._starting -= 1
        self._add_replica(now_s)

    def _scale(self, now_s: float) -> None:
        """Start or stop replicas, as Ray Serve does, so that each has `target_ongoing` requests."""
        fleet, most = self._fleet, self._fleet.most_replicas
        assert most is not None
        active = [one for one in self._replicas if not one.is_stopping]
        ongoing = sum(len(one.scheduler) for one in active)
        wanted = min(most, max(fleet.replicas, math.ceil(ongoing / fleet.target_ongoing)))
        there = len(active) + self._starting
        if wanted >= there:
            self._enough_since_s = now_s
        for _ in range(wanted - there):
            self._start(now_s)
        if wanted < len(active) and now_s - self._enough_since_s >= fleet.idle_s:
            for one in active[wanted:]:
                one.is_stopping = True
                self._call(one, now_s)
            self._enough_since_s = now_s
        self._at(now_s + SCALING_S, self._scale)
