"""`tdm-bench`: measure latency, throughput and goodput of a server, or of the engine in this process.

tdm-bench latency                                       one request at a time, by stage
tdm-bench throughput --max-concurrency 1,4,16           closed loop
tdm-bench server --request-rate 20 --goodput e2el:200   open loop, Poisson arrivals
tdm-bench offline                                       everything at once
tdm-bench compare                                       this server and other servers
tdm-bench turns                                         servers in turns of seconds, with ratios and their spread
tdm-bench backends                                      backends and the stock pipeline
tdm-bench live --strength 0.5                           pictures that follow a drawing
tdm-bench start                                         time to the first picture, idle CPU, memory
tdm-bench soak --duration-s 1800                        a long mixed load: does the server leak or fail?
tdm-bench profile --output costs.json                   a model's cost table
tdm-bench plan costs.json --load 0.6,1,1.5              how many replicas does a load need?
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import itertools
import secrets
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks import backends, compare, live, options, plots, soak, start, turns
from benchmarks.grpc_target import grpc_target
from benchmarks.load import Recording, closed_loop, open_loop
from benchmarks.machine import environment, environment_json
from benchmarks.plan import command as plan
from benchmarks.quality import quality_per_step_count
from benchmarks.report import Figures, figures, stage_table, terminal_table, write_json
from benchmarks.targets import EngineTarget, OpenAITarget, Target, http_session, running_engine, served_models
from benchmarks.workload import Workload, arrival_times, arrivals_within
from tdm_runtime.cli import backend_config
from tdm_runtime.engine.engine import EngineConfig
from tdm_runtime.errors import TDMError
from tdm_runtime.model.choice import load_model

INTERRUPTED = 130
QUALITY_PICTURES = 32


@dataclass
class Run:
    """One measurement; a mode may make several."""

    title: str
    setting: dict[str, Any]
    """Flag value of this run, for example {"max_concurrency": 4}."""
    recording: Recording = field(default_factory=Recording)


@dataclass
class Session:
    """Measurements so far; they are reported even if the run is interrupted."""

    runs: list[Run] = field(default_factory=list)
    served: dict[str, Any] = field(default_factory=dict)
    """Model, backend and digest reported by the target."""
    quality: list[plots.Quality] = field(default_factory=list)

    def begin(self, title: str, **setting: Any) -> Recording:
        """Add a run and return its recording."""
        self.runs.append(Run(title, setting))
        return self.runs[-1].recording


def main(arguments: list[str] | None = None) -> int:
    """Run the command. Returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    match arguments[:1]:
        case ["backends"]:
            return backends.main(arguments[1:])
        case ["compare"]:
            return compare.main(arguments[1:])
        case ["live"]:
            return live.main(arguments[1:])
        case ["start"]:
            return start.main(arguments[1:])
        case ["soak"]:
            return soak.main(arguments[1:])
        case ["turns"]:
            return turns.main(arguments[1:])
    parser = build_parser()
    given = parser.parse_args(arguments)
    try:
        if given.mode == "profile":
            return plan.run_profile(given)
        if given.mode == "plan":
            return plan.run_plan(given)
        given.sizes = options.sizes_of(given)
        if given.mode == "server" and given.duration_s is not None:
            for rate in given.request_rate:
                arrivals_within(0, rate, given.burstiness)  # raises for a rate of inf, which a duration cannot bound
        if given.plot is not None and importlib.util.find_spec("matplotlib") is None:
            raise ValueError("--plot needs matplotlib; run `pip install 'tdm-serve[bench]'`")
        given.backend_config = backend_config(given)
    except ValueError as error:
        parser.error(f"{given.mode}: {error}")
    return _measure_and_report(given)


def build_parser() -> options.Parser:
    """Return the parser of the command line."""
    parser = options.Parser(prog="tdm-bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_subparsers(dest="mode", required=True, metavar="MODE", parser_class=options.Parser)
    latency = modes.add_parser("latency", help="one request at a time, for each step count, with times per stage")
    throughput = modes.add_parser("throughput", help="closed loop: a fixed number of requests in flight")
    server = modes.add_parser("server", help="open loop: requests arrive on a schedule")
    offline = modes.add_parser("offline", help="everything at once")
    modes.add_parser("compare", help="this server and other servers; see `tdm-bench compare --help`", add_help=False)
    modes.add_parser("turns", help="servers in turns of seconds; see `tdm-bench turns --help`", add_help=False)
    modes.add_parser(
        "backends", help="backends and the stock pipeline; see `tdm-bench backends --help`", add_help=False
    )
    modes.add_parser("live", help="pictures that follow a drawing; see `tdm-bench live --help`", add_help=False)
    modes.add_parser("start", help="cost of a start; see `tdm-bench start --help`", add_help=False)
    modes.add_parser("soak", help="a long mixed load; see `tdm-bench soak --help`", add_help=False)
    profile = modes.add_parser("profile", help="measure a model's cost table for `plan`")
    plan.add_profile_arguments(profile)
    planning = modes.add_parser("plan", help="simulate replicas that run the real scheduler over a cost table")
    plan.add_plan_arguments(planning)
    for mode in (profile, planning):
        options.add_engine_arguments(mode)
    for mode in (latency, throughput, server, offline):
        options.add_target_arguments(mode)
        options.add_workload_arguments(mode, "1,4" if mode is latency else None)
        options.add_report_arguments(mode)
    throughput.add_argument(
        "--max-concurrency",
        type=options.int_list,
        default=(16,),
        help="requests in flight; a comma list runs a sweep (16)",
    )
    server.add_argument(
        "--request-rate",
        type=options.rate_list,
        default=(float("inf"),),
        help="requests/s; a comma list runs a sweep (inf)",
    )
    server.add_argument(
        "--burstiness", type=options.positive_float, default=1.0, help="1 = Poisson, below 1 = bursts (%(default)s)"
    )
    for mode in (server, offline):
        mode.add_argument(
            "--max-concurrency",
            type=options.positive_int,
            help="most requests in flight; waiting for a place counts as latency (no limit)",
        )
    for mode in (throughput, server):
        mode.add_argument(
            "--duration-s",
            type=options.positive_float,
            help="run for this many seconds instead of a number of requests",
        )
    return parser


def _measure_and_report(given: argparse.Namespace) -> int:
    session, status = Session(), 0
    try:
        asyncio.run(_measure(given, session))
    except KeyboardInterrupt:
        print("tdm-bench: interrupted; results so far:", file=sys.stderr)
        status = INTERRUPTED
    except (TDMError, ConnectionError) as error:
        print(f"tdm-bench {given.mode}: {error}", file=sys.stderr)
        return options.USAGE_ERROR
    _report(given, session)
    return status


# -- measuring --------------------------------------------------------------------------------


async def _measure(given: argparse.Namespace, session: Session) -> None:
    steps: tuple[Any, ...] = given.num_inference_steps
    workload = Workload(
        given.seed,
        steps,
        given.sizes,
        given.latency_budget_ms,
        given.min_inference_steps,
        given.strength,
        tag=secrets.token_hex(2),  # a server that was measured before must not hit its text cache
    )
    async with _open_target(given, session) as target:
        match given.mode:
            case "latency":
                await _latency(given, session, target, workload)
            case "throughput":
                await _throughput(given, session, target, workload)
            case "server":
                await _server(given, session, target, workload)
            case "offline":
                await _offline(given, session, target, workload)


@asynccontextmanager
async def _open_target(given: argparse.Namespace, session: Session) -> AsyncIterator[Target]:
    if given.endpoint_type == "openai":
        cards = await served_models(given.base_url)
        card = next((card for card in cards if given.model in (None, card.get("id"))), {})
        session.served = {name: card[name] for name in ("id", "backend", "digest") if name in card}
        async with http_session() as http:
            yield OpenAITarget(http, given.base_url, given.model)
        return
    if given.endpoint_type == "grpc":
        async with grpc_target(given.base_url, given.model) as target:
            session.served = next(iter(await target.served_models()), {})
            yield target
        return
    model = load_model(given.checkpoint, given.backend_config)
    session.served = {"id": model.recipe.name, "backend": model.backend, "digest": model.digest}
    with running_engine(model, _engine_config(given)) as engine:
        yield EngineTarget(engine)
    if given.mode == "latency" and given.plot is not None:
        session.quality = quality_per_step_count(model, QUALITY_PICTURES, given.seed)


def _engine_config(given: argparse.Namespace) -> EngineConfig:
    """Return a configuration whose queue holds all requests that are sent at once."""
    default = EngineConfig()
    is_bounded = given.mode == "offline" or (given.mode == "server" and float("inf") in given.request_rate)
    return replace(default, max_live=max(default.max_live, _count(given))) if is_bounded else default


async def _latency(given: argparse.Namespace, session: Session, target: Target, workload: Workload) -> None:
    for steps in workload.steps:
        asked = replace(workload, steps=(steps,), tag=f"{workload.tag} of {steps}")
        await _warm_up(given, target, asked, 1)
        recording = session.begin(f"K = {steps}", num_inference_steps=steps)
        await closed_loop(target, itertools.islice(asked.requests(), _count(given)), 1, recording)


async def _throughput(given: argparse.Namespace, session: Session, target: Target, workload: Workload) -> None:
    for concurrency in given.max_concurrency:
        asked = replace(workload, tag=f"{workload.tag} at {concurrency}")
        await _warm_up(given, target, asked, concurrency)
        recording = session.begin(f"{concurrency} in flight", max_concurrency=concurrency)
        count = None if given.num_prompts is None and given.duration_s is not None else _count(given)
        requests = itertools.islice(asked.requests(), count)
        await closed_loop(target, requests, concurrency, recording, given.duration_s)


async def _server(given: argparse.Namespace, session: Session, target: Target, workload: Workload) -> None:
    for rate in given.request_rate:
        asked = replace(workload, tag=f"{workload.tag} at {rate:g}")
        if given.duration_s is None:
            arrivals = arrival_times(_count(given), rate, given.burstiness, given.seed)
        else:
            arrivals = arrivals_within(given.duration_s, rate, given.burstiness, given.seed)[: given.num_prompts]
        await _warm_up(given, target, asked, 4)
        recording = session.begin(f"{rate:g} requests/s, burstiness {given.burstiness:g}", request_rate=str(rate))
        await open_loop(target, arrivals, asked.requests(), recording, given.max_concurrency)


async def _offline(given: argparse.Namespace, session: Session, target: Target, workload: Workload) -> None:
    await _warm_up(given, target, workload, 4)
    count = _count(given)
    recording = session.begin(f"{count} requests at once", num_prompts=count)
    await open_loop(target, [0.0] * count, workload.requests(), recording, given.max_concurrency)


async def _warm_up(given: argparse.Namespace, target: Target, workload: Workload, concurrency: int) -> None:
    asked = replace(workload, tag=f"{workload.tag} to warm up", latency_budget_ms=None)
    await closed_loop(target, itertools.islice(asked.requests(), given.num_warmups), concurrency, Recording())


def _count(given: argparse.Namespace) -> int:
    return options.DEFAULT_NUM_PROMPTS if given.num_prompts is None else int(given.num_prompts)


# -- reporting ----------------------------------------------------------------------------------


def _report(given: argparse.Namespace, session: Session) -> None:
    print(environment())
    print(", ".join(f"{name} {value}" for name, value in session.served.items()))
    results: list[Figures] = []
    for run in session.runs:
        found = figures(run.recording, given.goodput, given.metric_percentiles)
        results.append({**run.setting, **found})
        print()
        print(terminal_table(run.title, found))
        if table := stage_table(run.title, found):
            print(f"\n{table}")
    if given.save_result or given.result_filename:
        file = given.result_filename or Path(f"tdm-bench-{given.mode}.json")
        about = {"mode": given.mode, "environment": {**environment_json(), "served": session.served}}
        write_json(file, about | (results[0] if len(results) == 1 else {"runs": results}))
        print(f"\n{file}")
    if given.plot is not None:
        for file in _plots(given, session, results):
            print(file)


def _plots(given: argparse.Namespace, session: Session, results: list[Figures]) -> Iterator[Path]:
    """Write the plots of the mode and yield their files."""
    name = str(session.served.get("backend") or given.endpoint_type)
    latencies = {
        run.title: [1e3 * record.e2el_s for record in run.recording.records if record.is_completed]
        for run in session.runs
    }
    if latencies := {title: values for title, values in latencies.items() if values}:
        plots.plot_latency_cdf(file := given.plot / "latency.png", latencies, given.goodput)
        yield file
    measured = [found for found in results if found["completed"]]
    if given.mode == "throughput" and len(measured) > 1:
        loads = [
            plots.Load(found["max_concurrency"], found["request_throughput"], found["median_e2el_ms"])
            for found in measured
        ]
        plots.plot_throughput_latency(file := given.plot / "throughput.png", {name: loads})
        yield file
    if given.mode == "server" and given.goodput is not None and len(results) > 1:
        shares = {float(found["request_rate"]): found["goodput_share"] for found in results}
        plots.plot_goodput(file := given.plot / "goodput.png", {name: shares}, given.goodput)
        yield file
    if session.quality:
        plots.plot_quality_latency(file := given.plot / "quality.png", session.quality)
        yield file


if __name__ == "__main__":
    sys.exit(main())
