"""Measure `tdm-render`: speed beside the engine and a plain loop, memory on a large input, and kills.

    .venv/bin/tdm-export && .venv/bin/python -m benchmarks.render speed
    .venv/bin/python -m benchmarks.render kill
    .venv/bin/python -m benchmarks.render memory

`speed` runs all contenders one after the other in every round, so that changes in the machine's speed affect them
alike. The first quarter of a contender's pictures is not counted: engines start and warm up in it. On a machine that
others use too, the CPU time of a picture says more than pictures a second.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.machine import machine
from tdm_runtime.cli import add_backend_arguments, backend_config
from tdm_runtime.engine.engine import DiffusionEngine, EngineConfig
from tdm_runtime.engine.sample import Picture
from tdm_runtime.engine.warm_up import warm_up
from tdm_runtime.media.image_file import encode_image
from tdm_runtime.model.choice import load_model
from tdm_runtime.model.decoder import Pixels
from tdm_runtime.model.loaded_model import LoadedModel
from tdm_runtime.params import SamplingParams
from tdm_runtime.pipeline import generate

ENGINE, FILES, LOOP = (
    "engine in process, pixels",
    "engine in process, PNG in memory",
    "loop over generate, PNG in memory",
)
HERE, RAY = "tdm-render", "tdm-render --ray local --workers 2"
LIVE = 192
"""Pictures in the engine at once, as many as `tdm-render` keeps there."""
SAMPLE_S = 0.05


def main(arguments: list[str] | None = None) -> int:
    """Run the command. Returns the exit status: 1 if a check failed."""
    parser = argparse.ArgumentParser(prog="benchmarks.render", description=str(__doc__).partition("\n")[0])
    parser.add_argument("what", choices=["speed", "kill", "memory"])
    parser.add_argument("--pictures", type=int, default=2000, help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of `speed` (%(default)s)")
    parser.add_argument("--kills", type=int, default=10, help="(%(default)s)")
    parser.add_argument("--megabytes", type=int, default=1000, help="of the input of `memory` (%(default)s)")
    parser.add_argument("--skip", nargs="*", default=[], help="contenders of `speed` to leave out")
    add_backend_arguments(parser)
    given = parser.parse_args(arguments)
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        return {"speed": speed, "kill": kill, "memory": memory}[given.what](given, Path(folder))


def requests(number: int) -> list[SamplingParams]:
    """Return requests of mixed step counts; the embedded checkpoint has one size."""
    return [SamplingParams(f"a red heart {n}", n, 1 + n % 4, 64, 64) for n in range(number)]


def write_input(file: Path, number: int) -> Path:
    lines = (
        {"id": f"p{n}", "prompt": one.prompt, "seed": one.seed, "num_inference_steps": one.num_inference_steps}
        for n, one in enumerate(requests(number))
    )
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file


@dataclass(frozen=True)
class Pace:
    """Pictures of one contender in one round, after the first quarter."""

    per_s: float
    """Pictures a second."""
    cpu_ms: float
    """Time of all cores for one picture, in milliseconds."""


def speed(given: argparse.Namespace, folder: Path) -> int:
    """Print pictures a second of every contender, and ratios to the engine in the same round."""
    source = write_input(folder / "in.jsonl", given.pictures)
    model = load_model(config=backend_config(given))
    paces: dict[str, list[Pace]] = {name: [] for name in (ENGINE, FILES, LOOP, HERE, RAY) if name not in given.skip}
    for turn in range(given.rounds):
        for name in paces:
            paces[name].append(_pace(name, given, model, source, folder / f"out-{turn}-{len(name)}"))
            print(f"{name}: {paces[name][-1]}", file=sys.stderr, flush=True)
    print("| contender | pictures/s | of the engine (pixels) | of the engine (PNG) | CPU ms |\n|---|---|---|---|---|")
    for name, seen in paces.items():
        ratios = [_ratio(seen, paces.get(other)) for other in (ENGINE, FILES)]
        cpu_ms = statistics.median(pace.cpu_ms for pace in seen)
        print(f"| {name} | {', '.join(f'{p.per_s:.1f}' for p in seen)} | {' | '.join(ratios)} | {cpu_ms:.1f} |")
    return 0


def _ratio(seen: list[Pace], reference: list[Pace] | None) -> str:
    """Return the median over rounds of the ratio within a round."""
    if not reference:
        return ""
    return f"{statistics.median(a.per_s / b.per_s for a, b in zip(seen, reference, strict=True)):.2f}"


def _pace(name: str, given: argparse.Namespace, model: LoadedModel, source: Path, out: Path) -> Pace:
    if name in (HERE, RAY):
        more = ["--ray", "local", "--workers", "2"] if name == RAY else []
        return _pace_of_run([*_command(given, source, out), *more], out, given.pictures)
    asked = requests(given.pictures if name != LOOP else max(20, given.pictures // 5))
    if name == LOOP:
        return _pace_of(_as_png(params.prompt, generate(model, params)) for params in asked)
    with DiffusionEngine(model, EngineConfig(max_live=LIVE)) as engine:
        warm_up(engine)
        made = _saturated(engine, asked)
        return _pace_of(made if name == ENGINE else (_as_png(one.params.prompt, one.pixels) for one in made))


def _as_png(prompt: str, pixels: Pixels) -> bytes:
    return encode_image(pixels, "png", parameters=prompt)


def _pace_of(made: Iterator[object]) -> Pace:
    seen = [(time.monotonic(), time.process_time()) for _ in made]
    first = len(seen) // 4
    (began_s, cpu_began_s), (ended_s, cpu_ended_s) = seen[first], seen[-1]
    number = len(seen) - 1 - first
    return Pace(number / (ended_s - began_s), 1e3 * (cpu_ended_s - cpu_began_s) / number)


def _pace_of_run(command: list[str], out: Path, number: int) -> Pace:
    """Watch the files and the CPU time of a run and all its processes."""
    marks: list[tuple[int, float, float]] = []
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
        while running.poll() is None:
            count = sum(name.endswith(".png") for name in os.listdir(out)) if out.is_dir() else 0
            if count >= number // 4 and (not marks or count > marks[-1][0]):
                marks.append((count, time.monotonic(), _cpu_s(running.pid)))
            time.sleep(SAMPLE_S)
    assert running.returncode == 0 and marks[-1][0] == number, f"the run ended with {running.returncode}"
    (first, began_s, cpu_began_s), (last, ended_s, cpu_ended_s) = marks[0], marks[-1]
    return Pace((last - first) / (ended_s - began_s), 1e3 * (cpu_ended_s - cpu_began_s) / (last - first))


def _cpu_s(pid: int) -> float:
    total = 0.0
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            total += sum(process.cpu_times()[:2])
    return total


def _saturated(engine: DiffusionEngine, asked: list[SamplingParams]) -> Iterator[Picture]:
    """Yield pictures in order, with as many in the engine as it takes."""
    waiting: deque[Future[Picture]] = deque()
    for params in asked:
        if len(waiting) == LIVE:
            yield waiting.popleft().result()
        waiting.append(engine.submit(params))
    while waiting:
        yield waiting.popleft().result()


def _command(given: argparse.Namespace, source: Path | str, out: Path) -> list[str]:
    command = [sys.executable, "-m", "serving.offline.cli", str(source), "-o", str(out)]
    command += ["--backend", given.backend, "--threads", str(given.threads)]
    return command + (["--artifacts", str(given.artifacts)] if given.artifacts else [])


def kill(given: argparse.Namespace, folder: Path) -> int:
    """Kill a run at random moments, start it again each time, and compare the tree with an unkilled run's."""
    source = write_input(folder / "in.jsonl", given.pictures)
    subprocess.run(_command(given, source, folder / "whole"), check=True, stderr=subprocess.DEVNULL)
    out, draw = folder / "out", random.Random(1)
    for number in range(given.kills):
        with subprocess.Popen(_command(given, source, out), stderr=subprocess.DEVNULL) as running:
            began = wanted = None
            while running.poll() is None:
                finished = _finished(out)
                if began is None or finished < began:  # the start of a run gathers what is there
                    began, wanted = finished, draw.randrange(given.pictures // (given.kills + 1))
                if wanted is not None and finished >= began + max(1, wanted):
                    break
                time.sleep(1e-3 * draw.uniform(1, 20))
            os.kill(running.pid, signal.SIGKILL)
        print(f"kill {number + 1}: {_finished(out)} pictures finished", file=sys.stderr, flush=True)
    finished = _finished(out)
    last = subprocess.run(_command(given, source, out), check=True, stdout=subprocess.PIPE, text=True)
    ids = Counter(json.loads(line)["id"] for line in (out / "manifest.jsonl").read_bytes().splitlines())
    checks = {
        "identical tree": _hashes(out) == _hashes(folder / "whole"),
        "every id once": len(ids) == given.pictures and set(ids.values()) == {1},
        f"the {finished} finished pictures were kept": f" {finished} kept" in last.stdout,
    }
    for check, holds in checks.items():
        print(f"{'yes' if holds else 'NO'}: {check}")
    return 0 if all(checks.values()) else 1


def _finished(out: Path) -> int:
    """Return the number of pictures whose entries a run has written."""
    files = [*out.glob(".tdm-render/*s/*.jsonl"), *out.glob(".tdm-render/done.jsonl")]
    keys = set[bytes]()
    for file in files:
        with contextlib.suppress(FileNotFoundError):  # the run has just moved on
            keys.update(re.findall(rb'"key": "(\w+)".*\n', file.read_bytes()))
    return len(keys)


def _hashes(out: Path) -> dict[str, str]:
    """Return the hash of every file, without the log of times."""
    files = [file for file in sorted(out.rglob("*")) if file.is_file() and file.name != "times.jsonl"]
    return {str(file.relative_to(out)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def memory(given: argparse.Namespace, folder: Path) -> int:
    """Print the most memory of a run over a large input, and of one over a single line.

    Of the lines one in 5000 is a picture; the others are 2 kB that are read, checked and reported.
    """
    single, large = folder / "one.jsonl", folder / "large.jsonl"
    write_input(single, 1)
    with large.open("wb") as stream:
        number = 0
        while stream.tell() < given.megabytes * 10**6:
            number += 1
            steps = 1 if number % 5000 == 0 else 99
            line: dict[str, Any] = {"id": f"p{number}", "prompt": f"{number:01900d}", "num_inference_steps": steps}
            stream.write(json.dumps(line).encode() + b"\n")
    peaks = {name: _peak_mb(_command(given, file, folder / name)) for name, file in (("one", single), ("large", large))}
    print(f"one line: {peaks['one']:.0f} MB; {given.megabytes} MB in {number} lines: {peaks['large']:.0f} MB")
    return 0 if peaks["large"] - peaks["one"] < 300 else 1


def _peak_mb(command: list[str]) -> float:
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as running:
        process, peak = psutil.Process(running.pid), 0
        while running.poll() is None:
            try:
                peak = max(peak, process.memory_info().rss)
            except psutil.NoSuchProcess:
                break
            time.sleep(SAMPLE_S)
    return peak / 1e6


if __name__ == "__main__":
    sys.exit(main())
