"""`tdm-bench turns`: several servers in turns of seconds, so that a machine whose speed changes treats them alike.

All contenders are started once. In each round each has its turn, while the processes of all others are suspended. A
table gives the median and the range over the rounds, and the ratio to the first contender, round by round. With --loads
each server also answers requests that arrive at random, at shares of what the best peer makes: tdm-serve with "auto"
steps and a latency budget, a peer at a fixed step count. CPU time is that of all processes of a server; that of the
engine in process contains its client.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import options
from benchmarks.compare import is_busy, server_arguments
from benchmarks.contenders import ENGINE, OURS, NotRunError, all_contenders, running
from benchmarks.load import Recording, closed_loop
from benchmarks.machine import environment, environment_json
from benchmarks.peers.environment import interpreter_of
from benchmarks.phases import STEPS, Plan, Scenario, scenario_within_slo, slo_of
from benchmarks.report import figures, markdown_table, write_json
from benchmarks.targets import EngineTarget, OpenAITarget, Target, http_session, running_engine
from tdm_runtime.checkpoint.folder import open_checkpoint
from tdm_runtime.cli import backend_config
from tdm_runtime.errors import TDMError
from tdm_runtime.model.choice import load_model

Rounds = dict[str, dict[int, list[Mapping[str, float]]]]
"""Contender -> requests in flight -> figures of each round: pictures a second, p50 and p99 in milliseconds, and
milliseconds of CPU time a picture, of all the contender's processes."""
Loads = dict[str, dict[float, list[Mapping[str, float]]]]
"""Server -> load -> figures of each round: share of the requests in time, p99 in milliseconds, mean step count."""
FIGURES = ("pictures_per_s", "p50_ms", "p99_ms", "cpu_ms")
LOAD_FIGURES = ("goodput_share", "p99_e2el_ms", "mean_steps_used")
Started = Mapping[str, tuple[Callable[[], Any] | str, "Suspended"]]
"""Contender -> its address, or its target in this process, and its processes."""


@dataclass
class Suspended:
    """Processes of one contender, which can be stopped and continued."""

    processes: Sequence[Any]

    def cpu_s(self) -> float:
        """Return the CPU seconds of the processes so far; without processes those of this one."""
        if not self.processes:
            return time.process_time()
        import psutil

        spent_s = 0.0
        for process in self.processes:
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                spent_s += times.user + times.system
        return spent_s

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Let the processes run inside the block only."""
        self.resume()
        try:
            yield
        finally:
            self.suspend()

    def resume(self) -> None:
        """Let the processes run."""
        self._each("resume")

    def suspend(self) -> None:
        """Stop the processes."""
        self._each("suspend")

    def _each(self, method: str) -> None:
        import psutil

        for process in self.processes:
            with suppress(psutil.NoSuchProcess):
                getattr(process, method)()


def main(arguments: list[str]) -> int:
    """Run the command. Returns the exit status."""
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        backend_config(given)
        names = {one.name for one in all_contenders()} | {ENGINE}
        if unknown := [name for name in given.contenders if name not in names]:
            raise ValueError(f"there is no contender {unknown[0]!r}; choose from {', '.join(sorted(names))}")
        if given.loads and not set(given.contenders) - {OURS, ENGINE}:
            raise ValueError("--loads are shares of what a peer makes; name a peer among the contenders")
        plan = Plan(open_checkpoint(given.checkpoint).recipe.native_sizes[0], given.seed)
        if is_busy():
            print("the machine is busy; the figures will not be reliable", file=sys.stderr)
        with ExitStack() as stack:
            started = {name: _started(name, given, stack) for name in given.contenders}
            found = _closed_loops(started, given, plan)
            print(f"{environment()}; {given.rounds} rounds of {given.turn_s:g} s, K = {STEPS}\n")
            print(to_markdown(found), flush=True)  # the loads take minutes more
            peer = best_peer(found)
            loads = _open_loops(started, given, plan, peer) if given.loads else {}
    except (ValueError, OSError, TDMError, NotRunError) as error:
        parser.error(str(error))
    if loads:
        print(f"\nSLO {slo_of(peer):.0f} ms; load 1 is {peer['throughput']:.1f} pictures/s, of {peer['name']}\n")
        print(loads_to_markdown(loads))
    if given.output is not None:
        settings = {"environment": environment_json(), "turn_s": given.turn_s}
        write_json(given.output, settings | {"rounds": found, "peer": peer, "loads": loads})
    return 0


def _closed_loops(started: Started, given: argparse.Namespace, plan: Plan) -> Rounds:
    found: Rounds = {name: {number: [] for number in given.max_concurrency} for name in started}
    for round_number in range(given.rounds + 1):
        for number in given.max_concurrency:
            for name, (address, suspended) in started.items():
                with suspended.awake():
                    turn = asyncio.run(_turn(address, plan, number, given.turn_s, suspended.cpu_s))
                if round_number:  # the first round warms up
                    found[name][number].append(turn)
        print(f"round {round_number} of {given.rounds}", file=sys.stderr, flush=True)
    return found


def best_peer(found: Rounds) -> dict[str, Any]:
    """Return name, throughput and unloaded latency of the server, besides ours, that makes the most pictures.

    Empty without such a server. The latency is that with the fewest requests in flight.
    """

    def median(name: str, number: int, figure: str) -> float:
        return statistics.median(turn[figure] for turn in found[name][number])

    peers = [name for name in found if name not in (OURS, ENGINE)]
    if not peers:
        return {}
    throughput, name = max((median(name, number, FIGURES[0]), name) for name in peers for number in found[name])
    return {"name": name, "throughput": throughput, "unloaded_ms": median(name, min(found[name]), FIGURES[1])}


def _open_loops(started: Started, given: argparse.Namespace, plan: Plan, peer: dict[str, Any]) -> Loads:
    servers = {name: address for name, (address, _) in started.items() if isinstance(address, str)}
    found: Loads = {name: {load: [] for load in given.loads} for name in servers}
    for round_number in range(given.rounds):
        turn = replace(plan, seed=plan.seed + round_number, arrivals_s=given.turn_s)
        ours = turn.workload("auto", budget_ms=turn.budget_factor * slo_of(peer))
        for load in given.loads:
            for name, address in servers.items():
                asked = ours if name == OURS else turn.workload(STEPS)
                with started[name][1].awake():
                    seen = asyncio.run(scenario_within_slo(address, peer, turn, Scenario(load), asked, warm_up=False))
                found[name][load].append({figure: seen[figure] or 0.0 for figure in LOAD_FIGURES})
        print(f"round {round_number + 1} of {given.rounds} of the loads", file=sys.stderr, flush=True)
    return found


def _started(name: str, given: argparse.Namespace, stack: ExitStack) -> tuple[Callable[[], Any] | str, Suspended]:
    """Start a contender. Return its address, or its target in this process, and its processes, suspended."""
    if name == ENGINE:
        engine = stack.enter_context(running_engine(load_model(given.checkpoint, backend_config(given))))
        return lambda: EngineTarget(engine), Suspended([])
    import psutil

    theirs = ["--checkpoint", str(given.checkpoint)]
    contender = next(one for one in all_contenders(server_arguments(given), theirs) if one.name == name)
    before = set(psutil.Process().children(recursive=True))
    address = stack.enter_context(running(contender, given.logs, python=interpreter_of(contender.extra)))
    suspended = Suspended(sorted(set(psutil.Process().children(recursive=True)) - before, key=lambda one: one.pid))
    stack.callback(suspended.resume)  # a server that is suspended could not stop
    suspended.suspend()
    print(f"{name} runs", file=sys.stderr, flush=True)
    return address, suspended


async def _turn(
    address: Callable[[], Target] | str, plan: Plan, concurrency: int, turn_s: float, cpu_s: Callable[[], float]
) -> Mapping[str, float]:
    """Keep requests in flight for a turn. Return its figures."""
    recording, requests, before_s = Recording(), plan.workload(STEPS).requests(), cpu_s()
    if isinstance(address, str):
        async with http_session() as session:
            await closed_loop(OpenAITarget(session, address), requests, concurrency, recording, turn_s)
    else:
        await closed_loop(address(), requests, concurrency, recording, turn_s)
    seen = figures(recording)
    if seen["failed"] or not seen["completed"]:
        raise NotRunError(f"{address}: {seen['failed']} requests failed: {seen['errors']}")
    cpu_ms = 1e3 * (cpu_s() - before_s) / seen["completed"]
    found = (seen["request_throughput"], seen["median_e2el_ms"], seen["p99_e2el_ms"], cpu_ms)
    return dict(zip(FIGURES, found, strict=True))


def to_markdown(found: Rounds) -> str:
    """Return a table: one row for each contender and number of requests in flight."""
    first = next(iter(found))
    rows = []
    for number in found[first]:
        base = [turn["pictures_per_s"] for turn in found[first][number]]
        for name, turns in found.items():
            columns = {figure: [turn[figure] for turn in turns[number]] for figure in FIGURES}
            ratios = [base_s / own_s for base_s, own_s in zip(base, columns["pictures_per_s"], strict=True)]
            rows.append([str(number), name, *map(_spread, columns.values()), _spread(ratios, 2)])
    header = ["in flight", "contender", "pictures/s", "p50, ms", "p99, ms", "CPU ms a picture", f"{first} / this"]
    return markdown_table(header, rows)


def loads_to_markdown(found: Loads) -> str:
    """Return a table: one row for each load and server."""
    rows = []
    for load in next(iter(found.values())):
        for name, turns in found.items():
            good, p99, steps = ([turn[figure] for turn in turns[load]] for figure in LOAD_FIGURES)
            rows.append([f"{load:.0%}", name, _spread(good, 2), _spread(p99), _spread(steps, 2)])
    return markdown_table(["load", "server", "share in time", "p99, ms", "mean K"], rows)


def _spread(values: Sequence[float], digits: int = 1) -> str:
    """Return the median and the range of values."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def _parser() -> options.Parser:
    parser = options.Parser(
        prog="tdm-bench turns", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "contenders",
        nargs="*",
        default=["tdm-serve", "litserve_batch ours", ENGINE],
        help="contenders as in `tdm-bench compare`, ours first (%(default)s)",
    )
    parser.add_argument("--rounds", type=options.positive_int, default=5, help="measured rounds (%(default)s)")
    parser.add_argument("--turn-s", type=options.positive_float, default=4.0, help="seconds of a turn (%(default)g)")
    parser.add_argument(
        "--max-concurrency", type=options.int_list, default=(1, 4, 16), help="requests in flight, a comma list (1,4,16)"
    )
    parser.add_argument(
        "--loads", type=options.positive_list, default=(), help="open loops at these shares, a comma list, as 0.8,1.2,2"
    )
    parser.add_argument("--seed", type=options.whole_number, default=0, help="seed of the requests (%(default)s)")
    parser.add_argument(
        "--logs", type=Path, default=Path("runs/turns"), help="folder of the servers' output (%(default)s)"
    )
    parser.add_argument("--output", type=Path, help="JSON file for the figures of each turn")
    options.add_engine_arguments(parser)
    return parser
