"""`python -m benchmarks.gpu_run --output DIR --minutes 12` (`make gpu`): all that a machine with a GPU is wanted for.

Tests first, then the models on every backend, a clip, the server and training. Each part has a share of the time and is
stopped at its end; results are written after each part, so a run that is cut short keeps them. Nothing is fetched from
a network.
`--device cpu --tiny` tries the parts on a machine without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.contenders import OURS, NotRunError, all_contenders, running
from tdm_runtime.checkpoint.folder import DEFAULT_CHECKPOINT
from tdm_runtime.whole_file import write_whole

PARTS_FILE = "parts.json"
PYTHON = (sys.executable, "-m")
PICTURES = ("--checkpoint", str(DEFAULT_CHECKPOINT))
"""Arguments of our server: the embedded checkpoint of pictures alone."""
SERVER = "{server}"
"""Stands for the address of our server in a command; the server runs for the time of the part."""


@dataclass(frozen=True)
class Part:
    """One command, with its share of the time."""

    name: str
    command: tuple[str, ...]
    share: float
    """Of the time of all parts that are still to run, the most that this one may take, with weight `share`."""


@dataclass(frozen=True)
class Result:
    """What came of a part."""

    name: str
    status: str
    """"passed", "failed (N)", or why it did not end."""
    seconds: float
    log: str
    """File with its output, in the folder of the run."""


def parts_of(output: Path, device: str, tiny: bool) -> tuple[Part, ...]:
    """Return the parts of a run in their order."""
    accelerator = (*PYTHON, "export.accelerator", "--device", device, *(("--tiny",) if tiny else ()))
    rounds = ("--rounds", "2") if tiny else ("--batches", "1", "4", "8")

    def models(name: str) -> tuple[str, ...]:
        return (*accelerator, *rounds, "--models", name, "--output", str(output / "accelerator"))

    def figures(module: str) -> tuple[str, ...]:
        return (*PYTHON, module, "--device", device, *(("--tiny",) if tiny else ()), "--output", str(output))

    bench = (*PYTHON, "benchmarks.cli")
    to_server = ("--base-url", SERVER)
    seconds = ("--duration-s", "3" if tiny else "15")
    return (
        Part("tests", (*PYTHON, "pytest", "-q", "-ra", "tests/gpu"), 3),
        Part("embedded", models("embedded"), 2),
        Part("sd15", models("sd15"), 2),
        Part("sdxl", models("sdxl"), 3),
        Part("clip", figures("export.accelerator_clip"), 1),
        Part("throughput", (*bench, "throughput", "--max-concurrency", "1,4,16", *seconds, *to_server), 1.5),
        Part("goodput", (*bench, "server", "--request-rate", "20", "--goodput", "e2el:200", *seconds, *to_server), 1),
        Part("training", figures("training.pretrained.iteration"), 1),
    )


def run(parts: Sequence[Part], output: Path, minutes: float) -> list[Result]:
    """Run parts one after the other. What one leaves of its share goes to the others.

    Returns:
        The results, which are in `output / PARTS_FILE` too.
    """
    output.mkdir(parents=True, exist_ok=True)
    ends_s = time.monotonic() + 60 * minutes
    results: list[Result] = []
    for number, part in enumerate(parts):
        left_s = max(ends_s - time.monotonic(), 0)
        limit_s = left_s * part.share / sum(one.share for one in parts[number:])
        print(f"{part.name}: up to {limit_s:.0f} s", file=sys.stderr, flush=True)
        results.append(_run_part(part, output, limit_s))
        write_whole(output / PARTS_FILE, json.dumps([asdict(one) for one in results], indent=2).encode() + b"\n")
    return results


def _run_part(part: Part, output: Path, limit_s: float) -> Result:
    log, began_s = output / f"{part.name}.log", time.monotonic()
    ends_s = began_s + limit_s
    try:
        with ExitStack() as stack:
            command = part.command
            if SERVER in command:
                (ours,) = (one for one in all_contenders(PICTURES) if one.name == OURS)
                address = stack.enter_context(running(ours, output, limit_s))
                command = tuple(address if word == SERVER else word for word in command)
            with log.open("wb") as stream:
                process = subprocess.Popen(command, stdout=stream, stderr=stream, start_new_session=True)
            stack.callback(_stop_group, process.pid)
            code = process.wait(timeout=max(ends_s - time.monotonic(), 0))
        status = "passed" if code == 0 else f"failed ({code})"
    except subprocess.TimeoutExpired:
        status = f"stopped after {limit_s:.0f} s"
    except NotRunError as error:
        status = f"not run: {error}"
    return Result(part.name, status, round(time.monotonic() - began_s, 1), log.name)


def _stop_group(group: int) -> None:
    """Kill what a part has left running."""
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return


def table(results: Sequence[Result]) -> str:
    """Return the results as a Markdown table."""
    rows = [f"| {one.name} | {one.status} | {one.seconds:.0f} | {one.log} |" for one in results]
    return "\n".join(["| part | result | seconds | output |", "|---|---|---|---|", *rows])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status: 1 if a part did not pass."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_run", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder for logs, reports and tables")
    parser.add_argument("--minutes", type=float, default=12, help="time of all parts together (%(default)s)")
    parser.add_argument("--device", default="cuda", help="torch device (%(default)s)")
    parser.add_argument("--tiny", action="store_true", help="tiny models and short loads, only to try the parts")
    parser.add_argument("--parts", nargs="+", help="names of the parts to run; by default all")
    given = parser.parse_args(arguments)
    named: Mapping[str, Part] = {part.name: part for part in parts_of(given.output, given.device, given.tiny)}
    if unknown := [name for name in given.parts or () if name not in named]:
        parser.error(f"there is no part {', '.join(unknown)}; the parts are {', '.join(named)}")
    if given.minutes <= 0:
        parser.error(f"--minutes is {given.minutes:g}; it must be above 0")
    results = run([named[name] for name in given.parts or named], given.output, given.minutes)
    print(table(results))
    return 0 if all(one.status == "passed" for one in results) else 1


if __name__ == "__main__":
    sys.exit(main())
