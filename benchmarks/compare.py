"""`tdm-bench compare`: measure this server and other servers on one machine, one after the other."""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks import compare_plots, compare_tables, options, phases
from benchmarks.compare_tables import PEER_KINDS, Results, best_peer
from benchmarks.contenders import ENGINE, OURS, Contender, NotRunError, all_contenders, running
from benchmarks.machine import environment, environment_json
from benchmarks.overhead import overhead
from benchmarks.peers.environment import FOLDER, interpreter_of
from benchmarks.phases import STEPS, NothingMeasuredError, Plan
from benchmarks.quality import quality_per_step_count
from benchmarks.report import write_json
from tdm_runtime.checkpoint.folder import DEFAULT_CHECKPOINT, open_checkpoint
from tdm_runtime.cli import backend_config
from tdm_runtime.errors import TDMError
from tdm_runtime.model.artifacts import BackendConfig
from tdm_runtime.model.choice import load_model
from tdm_runtime.model.loaded_model import LoadedModel

PHASES = ("contenders", "slo", "joining", "isolation", "overhead", "quality")
RESULT_FILE = "compare.json"
TABLES_FILE = "compare.md"
DOCS = Path("docs/performance.md")
INTERRUPTED = 130


def main(arguments: list[str] | None = None) -> int:
    """Run the command. Returns the exit status: 1 if a phase failed."""
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        config = backend_config(given)
        checkpoint = open_checkpoint(given.checkpoint)
        if given.write_docs is not None:
            compare_tables.check_markers(given.write_docs)
        if importlib.util.find_spec("matplotlib") is None:
            raise ValueError("the plots need matplotlib; run `pip install 'tdm-serve[bench]'`")
        given.output.mkdir(parents=True, exist_ok=True)
        make_plan = Plan.quick if given.quick else Plan
        plan = make_plan(checkpoint.recipe.native_sizes[0], given.seed, given.budget_factor)
        comparison = Comparison(given, config, plan, _earlier(given))
    except (ValueError, OSError, TDMError) as error:
        parser.error(str(error))
    status = 0
    try:
        comparison.run()
    except KeyboardInterrupt:
        print("tdm-bench compare: interrupted; results so far:", file=sys.stderr)
        status = INTERRUPTED
    comparison.report()
    return status or int(any("error" in comparison.results.get(phase, {}) for phase in given.only))


def _parser() -> options.Parser:
    parser = options.Parser(prog="tdm-bench compare", description=__doc__)
    names = [ENGINE, *(contender.name for contender in all_contenders())]
    parser.add_argument("--output", type=Path, default=Path("runs/compare"), help="output folder (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="short trial run; its figures mean nothing")
    parser.add_argument(
        "--only", nargs="+", choices=PHASES, help="phases to measure; keep the others from the output folder"
    )
    parser.add_argument(
        "--contenders",
        nargs="+",
        choices=names,
        metavar="NAME",
        help=f"contenders to measure; keep the others. One or more of: {', '.join(map(repr, names))}",
    )
    parser.add_argument(
        "--peers-python",
        help=f"interpreter of an environment with the peers' packages (default: those that are made in {FOLDER})",
    )
    parser.add_argument(
        "--seed", type=options.whole_number, default=0, help="seed of schedules and requests (%(default)s)"
    )
    parser.add_argument(
        "--budget-factor",
        type=options.positive_float,
        default=0.85,
        help="latency budget as a share of the SLO; HTTP gets the rest (%(default)s)",
    )
    parser.add_argument(
        "--write-docs",
        type=Path,
        nargs="?",
        const=DOCS,
        metavar="FILE",
        help=f"replace the tables in this file ({DOCS})",
    )
    options.add_engine_arguments(parser)
    return parser


def _earlier(given: argparse.Namespace) -> Results:
    """Return the earlier results in the output folder if only a part is measured again; else an empty dict."""
    file = given.output / RESULT_FILE
    is_part = given.only is not None or given.contenders is not None
    given.only = given.only or list(PHASES)
    if not is_part or not file.is_file():
        return {}
    earlier: Results = json.loads(file.read_text(encoding="utf-8"))
    return earlier


def server_arguments(given: argparse.Namespace) -> list[str]:
    """Return the server arguments that match the engine in this process."""
    arguments = ["--checkpoint", str(given.checkpoint), "--backend", given.backend, "--threads", str(given.threads)]
    if given.provider is not None:
        arguments += ["--provider", given.provider]
    if given.precision is not None:
        arguments += ["--precision", given.precision]
    if given.artifacts is not None:
        arguments += ["--artifacts", str(given.artifacts)]
    return [*arguments, "--allow-fallback"] if given.allow_fallback else arguments


class Comparison:
    """The phases, one after the other. Each result is saved at once, so that a later failure loses nothing."""

    def __init__(self, given: argparse.Namespace, config: BackendConfig, plan: Plan, earlier: Results) -> None:
        self._given = given
        self._config = config
        self._plan = plan
        peer_arguments = [] if given.checkpoint == DEFAULT_CHECKPOINT else ["--checkpoint", str(given.checkpoint)]
        contenders = all_contenders(server_arguments(given), peer_arguments)
        self._contenders = {contender.name: contender for contender in contenders}
        about = {"environment": environment_json(), "plan": asdict(plan)}
        self.results: Results = {"measured": {}, **earlier, **about}
        self._is_part = given.contenders is not None
        self._conditions = {"machine": str(environment()), "is_quick": given.quick, "is_busy": is_busy()}
        if self._conditions["is_busy"]:
            _say(f"the machine is busy (load average {os.getloadavg()[0]:.1f}); the figures will not be reliable")

    @cached_property
    def _model(self) -> LoadedModel:
        return load_model(self._given.checkpoint, self._config)

    def run(self) -> None:
        """Measure every requested phase. A failed phase is reported in place of its result."""
        methods: Mapping[str, Callable[[], Any]] = {
            "slo": self._within_slo,
            "joining": lambda: asyncio.run(phases.joining(self._model, self._plan)),
            "isolation": lambda: asyncio.run(phases.isolation(self._model, self._plan)),
            "overhead": lambda: overhead(self._model, self._plan.overhead_pictures, STEPS, self._plan.seed),
            "quality": self._quality,
        }
        for phase in PHASES:
            if phase not in self._given.only:
                continue
            started_s = time.monotonic()
            self._note_conditions(phase, keep=phase == "contenders" and self._is_part)
            if phase == "contenders":
                self._measure_contenders()
            else:
                try:
                    self.results[phase] = methods[phase]()
                except Exception as error:
                    self.results[phase] = {"error": _sentence(error)}
                    _say(f"{phase} failed: {_sentence(error)}")
                self._save()
            _say(f"{phase}: {time.monotonic() - started_s:.0f} s")

    def _note_conditions(self, phase: str, keep: bool) -> None:
        """Record the conditions of a phase for the tables; `keep` also keeps those of earlier parts."""
        before = self.results["measured"].get(phase, []) if keep else []
        self.results["measured"][phase] = [*before, *([] if self._conditions in before else [self._conditions])]

    def report(self) -> None:
        """Print the tables; write the tables and the plots."""
        self._save()
        tables = compare_tables.to_markdown(self.results)
        print(tables)
        (self._given.output / TABLES_FILE).write_text(tables, encoding="utf-8")
        if self._given.write_docs is not None:
            compare_tables.write_between_markers(self._given.write_docs, tables)
        compare_plots.draw(self.results, self._given.output)

    def _save(self) -> None:
        write_json(self._given.output / RESULT_FILE, self.results)

    # -- phases -------------------------------------------------------------------------------

    def _measure_contenders(self) -> None:
        wanted = self._given.contenders or [*self._contenders, ENGINE]
        found: dict[str, Any] = self.results.get("contenders", {}) if self._is_part else {}
        self.results["contenders"] = found
        for name in wanted:
            try:
                found[name] = self._measure(name)
                _say(f"{name}: {found[name]['unloaded_ms']:.1f} ms alone, {found[name]['throughput']:.1f} pictures/s")
            except Exception as error:
                found[name] = {"not_run": _sentence(error)}
                _say(f"{name}: not run: {found[name]['not_run']}")
            self._save()

    def _measure(self, name: str) -> dict[str, Any]:
        if name == ENGINE:
            return asyncio.run(phases.measure_engine(self._model, self._plan))
        contender = self._contenders[name]
        with self._running(contender) as base_url:
            found = asyncio.run(phases.measure_server(base_url, self._plan))
        return {**found, "given": contender.backend} if contender.is_peer else found

    def _running(self, contender: Contender) -> Any:
        is_given = contender.extra and self._given.peers_python is not None
        python = self._given.peers_python if is_given else interpreter_of(contender.extra)
        return running(contender, self._given.output / "logs", python=python)

    def _within_slo(self) -> dict[str, Any]:
        return {kind: self._against(best_peer(self._measured(), *backends)) for kind, backends in PEER_KINDS.items()}

    def _measured(self) -> Mapping[str, Any]:
        contenders: Mapping[str, Any] = self.results.get("contenders", {})
        return contenders

    def _against(self, name: str | None) -> dict[str, Any]:
        if name is None:
            return {"not_run": "no such peer was measured"}
        peer = self._measured()[name]
        try:
            with self._running(self._contenders[name]) as base_url:
                theirs = asyncio.run(phases.peer_within_slo(base_url, peer, self._plan))
            with self._running(self._contenders[OURS]) as base_url:
                auto, fixed = asyncio.run(phases.ours_within_slo(base_url, peer, self._plan))
        except Exception as error:
            return {"not_run": _sentence(error)}
        about = {"name": name, "slo_ms": phases.slo_of(peer), "capacity": peer["throughput"]}
        return {**about, "peer": theirs, "auto": auto, "fixed": fixed}

    def _quality(self) -> dict[str, Any]:
        pictures = self._plan.quality_pictures
        points = quality_per_step_count(self._model, pictures, self._plan.seed)
        return {"pictures": pictures, "points": [asdict(point) for point in points]}


def is_busy() -> bool:
    """Return whether more than half of the cores were busy during the last minute."""
    return os.getloadavg()[0] > 0.5 * (os.cpu_count() or 1)


def _sentence(error: Exception) -> str:
    """Return the message of an expected error; add the type to the message of any other."""
    expected = (NotRunError, NothingMeasuredError, TDMError, OSError)
    return str(error) if isinstance(error, expected) else f"{type(error).__name__}: {error}"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
