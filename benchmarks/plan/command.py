"""`tdm-bench plan`: what a fleet of servers would do under a load, and how many replicas it needs."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from benchmarks import options
from benchmarks.load import Recording, open_loop
from benchmarks.machine import environment
from benchmarks.plan.cost_table import CostTable, read_table
from benchmarks.plan.fleet import Fleet, Policy, Result, Route, Simulation
from benchmarks.plan.profile import RecordedCosts, profile
from benchmarks.plots import plot_goodput
from benchmarks.report import figures, markdown_table, write_json
from benchmarks.targets import EngineTarget, running_engine
from benchmarks.workload import Request, Workload, arrivals_within
from tdm_runtime.cli import backend_config
from tdm_runtime.errors import TDMError
from tdm_runtime.model.choice import load_model

SLO_TIMES = 3.0
"""Default latency limit of goodput, in times of a lone request."""
MOST_REPLICAS = 1 << 16
COLUMNS = ("policy", "route", "replicas", "requests/s", "goodput", "p50, ms", "p99, ms", "refused", "late", "mean K")
MORE_COLUMNS = ("K", "busy", "USD per 1000")
VALIDATED_LOADS = (0.6, 1.0, 1.5)


@dataclass(frozen=True)
class Trace:
    """Requests with their arrival times."""

    arrivals: Sequence[float]
    requests: Iterable[Request]


def add_profile_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `tdm-bench profile`."""
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the cost table")
    parser.add_argument("--duration-s", type=options.positive_float, default=15.0, help="of the load (%(default)s)")
    parser.add_argument("--base-url", help="server of the model, whose way to the client is measured too (none)")
    parser.add_argument("--usd-per-hour", type=options.positive_float, help="price of one replica")


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `tdm-bench plan`."""
    parser.add_argument("costs", nargs="+", help="cost table: file of `tdm-bench profile`, or a published one by name")
    parser.add_argument("--shares", type=_floats, help="share of each table in the requests (equal)")
    parser.add_argument(
        "--further-sample",
        type=options.positive_float,
        metavar="SHARE",
        help="what each further sample of a call costs, as a share of the first (the table's own)",
    )
    load = parser.add_mutually_exclusive_group()
    load.add_argument("--request-rate", type=options.rate_list, help="requests/s; a comma list runs a sweep")
    load.add_argument("--load", type=_floats, default=(1.0,), help="the same as a share of the fleet's capacity (1)")
    load.add_argument("--trace", type=Path, help="JSON lines with arrival_s and any of the fields of a request")
    parser.add_argument("--burstiness", type=options.positive_float, default=1.0, help="1 = Poisson, below 1 = bursts")
    parser.add_argument("--duration-s", type=options.positive_float, default=60.0, help="simulated (%(default)s)")
    parser.add_argument("--num-inference-steps", type=options.step_list, default=("auto",), help="a mixture (auto)")
    parser.add_argument("--min-inference-steps", type=options.positive_int, help="fewest steps of auto (1)")
    parser.add_argument("--width", type=options.int_list, default=(), help="pixels, a mixture (the table's first size)")
    parser.add_argument("--height", type=options.int_list, default=(), help="pixels, one for each --width")
    parser.add_argument("--latency-budget-ms", type=options.positive_float, help="of every request (the goodput limit)")
    parser.add_argument("--goodput", type=options.goodput_ms, metavar="e2el:MS", help="limit (3 lone requests)")
    parser.add_argument("--replicas", type=options.int_list, default=(1,), help="a comma list runs a sweep (1)")
    parser.add_argument(
        "--target", type=_share, help="find the fewest replicas with this share of goodput, such as .99"
    )
    parser.add_argument("--most-replicas", type=options.positive_int, help="run an autoscaler up to this number")
    parser.add_argument("--target-ongoing", type=options.positive_float, default=4.0, help="of the autoscaler (4)")
    parser.add_argument("--start-s", type=options.positive_float, default=30.0, help="start of a replica (%(default)s)")
    parser.add_argument("--failures-per-hour", type=options.positive_float, default=0.0, help="of each replica (none)")
    parser.add_argument("--policy", type=_one_of(get_args(Policy)), default=("joining",), help="a comma list (joining)")
    parser.add_argument("--route", type=_one_of(get_args(Route)), default=("least-work",), help="a comma list")
    parser.add_argument("--usd-per-hour", type=options.positive_float, help="price of one replica (the table's)")
    parser.add_argument("--seed", type=options.whole_number, default=0, help="(%(default)s)")
    parser.add_argument("--validate", action="store_true", help="measure the engine here under the same loads too")
    parser.add_argument("--result-filename", type=Path, help="file for the results as JSON")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="folder for plots as PNG files")


def run_profile(given: argparse.Namespace) -> int:
    """Run `tdm-bench profile`. Returns the exit status."""
    try:
        model, costs = load_model(given.checkpoint, backend_config(given)), RecordedCosts()
        with running_engine(model, costs=costs) as engine:
            table = profile(engine, costs, given.duration_s, given.base_url)
    except (TDMError, ConnectionError) as error:
        print(f"tdm-bench profile: {error}", file=sys.stderr)
        return options.USAGE_ERROR
    replace(table, usd_per_hour=given.usd_per_hour).write(given.output)
    lone_ms, rate = 1e3 * table.unloaded_s(), table.capacity()
    print(f"{given.output}: a lone request takes {lone_ms:.1f} ms; {rate:.1f} pictures/s of {table.steps} steps")
    return 0


def run_plan(given: argparse.Namespace) -> int:
    """Run `tdm-bench plan`. Returns the exit status.

    Raises:
        ValueError: A flag, a table or the trace is wrong.
    """
    tables = [read_table(name) for name in given.costs]
    if given.further_sample:
        tables = [table.with_further_samples(given.further_sample) for table in tables]
    if given.shares is not None and len(given.shares) != len(tables):
        raise ValueError(f"--shares has {len(given.shares)} values for {len(tables)} tables; give one for each")
    for table in tables:
        _check(given, table)
    results = [_summary(given, tables, *case) for case in _cases(given, tables)]
    for table in tables:
        print(f"{table.name} on {table.machine} ({table.source})")
    print(f"goodput is within {_slo_ms(given, tables):.0f} ms\n")
    print(markdown_table([*COLUMNS, *MORE_COLUMNS], [_row(found) for found in results]))
    if given.validate:
        print("\n" + validate(given))
    if given.result_filename:
        write_json(given.result_filename, {"costs": [table.name for table in tables], "runs": results})
    if given.plot:
        shares: defaultdict[str, dict[float, float]] = defaultdict(dict)
        for found in results:
            label = f"{found['policy']}, {found['route']}, {found['replicas']} replicas"
            shares[label][found["request_rate"]] = found["goodput_share"]
        plot_goodput(file := given.plot / "plan.png", shares, _slo_ms(given, tables), "Simulated goodput")
        print(file)
    return 0


def _check(given: argparse.Namespace, table: CostTable) -> None:
    """Check that a table has the sizes and step counts that are asked for.

    Raises:
        ValueError: It has not.
    """
    for size in options.sizes_of(given):
        table.size(size)
    for steps in (*given.num_inference_steps, given.min_inference_steps or "auto"):
        if steps != "auto" and steps not in table.step_counts:
            counts = ", ".join(map(str, table.step_counts))
            raise ValueError(f"{table.name} makes no pictures of {steps} steps; it makes them of {counts}")


def _cases(given: argparse.Namespace, tables: Sequence[CostTable]) -> Iterator[tuple[Fleet, float, Result]]:
    """Simulate the fleets at the request rates; with --target yield the smallest fleet that reaches it."""
    for policy in given.policy:
        for route in given.route:
            fleet = Fleet(
                most_replicas=given.most_replicas,
                target_ongoing=given.target_ongoing,
                start_s=given.start_s,
                failures_per_hour=given.failures_per_hour,
                policy=policy,
                route=route,
            )
            for rate in _rates(given, tables, 1) if given.target else ():
                yield _smallest(given, tables, fleet, rate)
            for replicas in () if given.target else given.replicas:
                for rate in _rates(given, tables, replicas):
                    sized = replace(fleet, replicas=replicas)
                    yield sized, rate, _simulated(given, tables, sized, rate)


def _simulated(given: argparse.Namespace, tables: Sequence[CostTable], fleet: Fleet, rate: float) -> Result:
    trace = _trace(given, rate, tables)
    return Simulation(tables, fleet, given.shares, given.seed).run(trace.arrivals, trace.requests)


def _rates(given: argparse.Namespace, tables: Sequence[CostTable], replicas: int) -> Sequence[float]:
    if given.trace:
        return (math.nan,)
    if given.request_rate:
        return tuple(given.request_rate)
    shares = given.shares or [1.0] * len(tables)
    mean_s = sum(share / table.capacity() for share, table in zip(shares, tables, strict=True)) / sum(shares)
    return [load * replicas / mean_s for load in given.load]


def _smallest(
    given: argparse.Namespace, tables: Sequence[CostTable], fleet: Fleet, rate: float
) -> tuple[Fleet, float, Result]:
    """Return the fleet with the fewest replicas whose share of goodput reaches the target, the rate, and its result.

    Raises:
        ValueError: `MOST_REPLICAS` do not reach it.
    """

    results: dict[int, Result] = {}

    def reaches(replicas: int) -> bool:
        results[replicas] = result = _simulated(given, tables, replace(fleet, replicas=replicas), rate)
        share = figures(result.recording, _slo_ms(given, tables))["goodput_share"]
        return share is not None and share >= given.target

    fewest = min(given.min_inference_steps or 1 if n == "auto" else n for n in given.num_inference_steps)
    low = 0 if given.trace else int(given.target * rate / max(table.capacity(fewest) for table in tables))
    high = low + 1
    while not reaches(high):
        low, high = high, 2 * high
        if high > MOST_REPLICAS:
            raise ValueError(f"{low} replicas do not reach {given.target:g}; raise the limit of --goodput")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reaches(middle) else (middle, high)
    return replace(fleet, replicas=high), rate, results[high]


def _trace(given: argparse.Namespace, rate: float, tables: Sequence[CostTable]) -> Trace:
    budget_ms = given.latency_budget_ms or _slo_ms(given, tables)
    if given.trace:
        return read_trace(given.trace, budget_ms)
    sizes, fewest = options.sizes_of(given), given.min_inference_steps
    workload = Workload(given.seed, given.num_inference_steps, sizes, budget_ms, fewest)
    arrivals = arrivals_within(given.duration_s, rate, given.burstiness, given.seed)
    return Trace(arrivals, workload.requests())


def read_trace(file: Path, budget_ms: float) -> Trace:
    """Read a trace: JSON lines with `arrival_s`, and `num_inference_steps`, `size` and `latency_budget_ms` if known.

    Raises:
        ValueError: The file cannot be read or a line has something else; the message gives its number.
    """
    arrivals, requests = [], []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the trace {file} cannot be read: {error}") from None
    for number, line in enumerate(lines, 1):
        try:
            fields = json.loads(line)
            arrivals.append(float(fields.pop("arrival_s")))
            if (size := fields.pop("size", None)) is not None:
                width, height = size.split("x")
                fields["size"] = (int(width), int(height))
            requests.append(Request("", 0, **{"num_inference_steps": "auto", "latency_budget_ms": budget_ms} | fields))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"line {number} of the trace {file} is no request with arrival_s: {error}") from None
    if not arrivals:
        raise ValueError(f"the trace {file} has no requests")
    order = sorted(range(len(arrivals)), key=lambda index: arrivals[index])
    return Trace([arrivals[index] for index in order], [requests[index] for index in order])


# -- results ------------------------------------------------------------------------------------


def _slo_ms(given: argparse.Namespace, tables: Sequence[CostTable]) -> float:
    return float(given.goodput or SLO_TIMES * 1e3 * max(table.unloaded_s() for table in tables))


def _summary(
    given: argparse.Namespace, tables: Sequence[CostTable], fleet: Fleet, rate: float, result: Result
) -> dict[str, Any]:
    found = figures(result.recording, _slo_ms(given, tables))
    del found["e2els"], found["start_times"]
    usd = given.usd_per_hour or tables[0].usd_per_hour
    made = found["completed"]
    return {
        "policy": fleet.policy,
        "route": fleet.route,
        "replicas": fleet.replicas if fleet.most_replicas is None else f"{fleet.replicas}-{result.most_replicas}",
        "request_rate": rate if math.isfinite(rate) else len(result.recording.records) / found["duration"],
        **found,
        "late": result.late,
        "busy_share": result.busy_s / result.replica_s,
        "usd_per_thousand": None if usd is None or not made else 1e3 * usd * result.replica_s / 3600 / made,
    }


def _row(found: dict[str, Any]) -> list[str]:
    asked = found["completed"] + found["refused"] + found["failed"]
    counts = " ".join(f"{k}:{100 * n / max(1, found['completed']):.0f}%" for k, n in found["steps_used"].items())
    usd = found["usd_per_thousand"]
    return [
        found["policy"],
        found["route"],
        str(found["replicas"]),
        f"{found['request_rate']:.4g}",
        f"{found['goodput_share']:.3f}",
        _ms(found["median_e2el_ms"]),
        _ms(found["p99_e2el_ms"]),
        f"{found['refused'] / asked:.1%}",
        f"{found['late'] / asked:.1%}",
        "-" if found["mean_steps_used"] is None else f"{found['mean_steps_used']:.2f}",
        counts,
        f"{found['busy_share']:.0%}",
        "-" if usd is None else f"{usd:.3f}",
    ]


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


# -- validation ---------------------------------------------------------------------------------


def validate(given: argparse.Namespace) -> str:
    """Run the same arrivals on the engine in this process and in the simulation. Returns a Markdown table."""
    rows = []
    model, costs = load_model(given.checkpoint, backend_config(given)), RecordedCosts()
    with running_engine(model, costs=costs) as engine:
        table = profile(engine, costs, given.duration_s)
        slo_ms = _slo_ms(given, [table])
        for load in VALIDATED_LOADS:
            rate = load * table.capacity()
            arrivals = arrivals_within(given.duration_s, rate, given.burstiness, given.seed)
            workload = Workload(given.seed, given.num_inference_steps, (None,), slo_ms, tag=f"{load}")
            real = Recording()
            asyncio.run(open_loop(EngineTarget(engine), arrivals, workload.requests(), real))
            simulated = Simulation([table], Fleet(), seed=given.seed).run(arrivals, workload.requests()).recording
            for name, one in (("real", real), ("simulated", simulated)):
                found = figures(one, slo_ms)
                ms = [_ms(found[key]) for key in ("median_e2el_ms", "p99_e2el_ms")]
                rows.append(
                    [f"{load:.0%}", name, f"{found['goodput_share']:.3f}", *ms, f"{found['mean_steps_used']:.2f}"]
                )
    header = ["load", "run", "goodput", "p50, ms", "p99, ms", "mean K"]
    return f"{environment()}, {model.backend}, goodput within {slo_ms:.0f} ms\n\n" + markdown_table(header, rows)


# -- values -------------------------------------------------------------------------------------


def _floats(text: str) -> tuple[float, ...]:
    return tuple(options.positive_float(part) for part in text.split(","))


def _share(text: str) -> float:
    if (value := options.positive_float(text)) >= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is out of range; it must be below 1")
    return value


def _one_of(known: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    def read(text: str) -> tuple[str, ...]:
        for part in text.split(","):
            if part not in known:
                raise argparse.ArgumentTypeError(f"{part!r} is unknown; take of {', '.join(known)}")
        return tuple(text.split(","))

    return read
