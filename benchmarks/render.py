"""Measure `tdm-render`: speed beside the engine and a plain loop, memory on a large input, and kills.

    .venv/bin/tdm-export && .venv/bin/python -m benchmarks.render speed
    .venv/bin/python -m benchmarks.render kill
    .venv/bin/python -m benchmarks.render memory

`speed` runs all contenders one after the other in every round, so that changes in the machine's speed affect them
alike. A contender's time is from the submission of its first picture to the end of its last one, without the start.
Ask for many more pictures than the engine holds (192), so that its filling and emptying count little.
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


def speed(given: argparse.Namespace, folder: Path) -> int:
    """Print pictures a second of every contender, and ratios to the engine in the same round."""
    source = write_input(folder / "in.jsonl", given.pictures)
    model = load_model(config=backend_config(given))
    rates: dict[str, list[float]] = {name: [] for name in (ENGINE, FILES, LOOP, HERE, RAY) if name not in given.skip}
    for turn in range(given.rounds):
        for name in rates:
            rates[name].append(_rate(name, given, model, source, folder / f"out-{turn}-{len(name)}"))
            print(f"{name}: {rates[name][-1]:.1f} pictures/s", file=sys.stderr, flush=True)
    print("| contender | pictures/s | of the engine (pixels) | of the engine (PNG) |\n|---|---|---|---|")
    for name, seen in rates.items():
        ratios = [_ratio(seen, rates.get(other)) for other in (ENGINE, FILES)]
        print(f"| {name} | {', '.join(f'{rate:.1f}' for rate in seen)} | {' | '.join(ratios)} |")
    return 0


def _ratio(seen: list[float], reference: list[float] | None) -> str:
    """Return the median over rounds of the ratio within a round."""
    return f"{statistics.median(a / b for a, b in zip(seen, reference, strict=True)):.2f}" if reference else ""


def _rate(name: str, given: argparse.Namespace, model: LoadedModel, source: Path, out: Path) -> float:
    if name in (HERE, RAY):
        more = ["--ray", "local", "--workers", "2"] if name == RAY else []
        subprocess.run([*_command(given, source, out), *more], check=True, stdout=sys.stderr, stderr=subprocess.DEVNULL)
        return _rate_of_run(out)
    asked = requests(given.pictures if name != LOOP else max(20, given.pictures // 5))
    if name == LOOP:
        return _rate_of(_as_png(params.prompt, generate(model, params)) for params in asked)
    with DiffusionEngine(model, EngineConfig(max_live=LIVE)) as engine:
        warm_up(engine)
        made = _saturated(engine, asked)
        return _rate_of(made if name == ENGINE else (_as_png(one.params.prompt, one.pixels) for one in made))


def _as_png(prompt: str, pixels: Pixels) -> bytes:
    return encode_image(pixels, "png", parameters=prompt)


def _rate_of(made: Iterator[object]) -> float:
    began_s = time.monotonic()
    number = sum(1 for _ in made)
    return number / (time.monotonic() - began_s)


def _rate_of_run(out: Path) -> float:
    times = [json.loads(line) for line in (out / "times.jsonl").read_bytes().splitlines()]
    began_s = min(one["finished_at"] - 1e-3 * one["total_ms"] for one in times)
    ended_s = max(one["finished_at"] for one in times)
    return float(len(times) / (ended_s - began_s))


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
                finished = len(finished_keys(out))
                if began is None or finished < began:  # the start of a run gathers what is there
                    began, wanted = finished, draw.randrange(given.pictures // (given.kills + 1))
                if wanted is not None and finished >= began + max(1, wanted):
                    break
                time.sleep(1e-3 * draw.uniform(1, 20))
            os.kill(running.pid, signal.SIGKILL)
        print(f"kill {number + 1}: {len(finished_keys(out))} pictures finished", file=sys.stderr, flush=True)
    finished = len(finished_keys(out))
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


def finished_keys(out: Path) -> set[bytes]:
    """Return the keys of the pictures that an unfinished run has recorded; a running one may hide some for a moment."""
    keys = set[bytes]()
    with contextlib.suppress(FileNotFoundError):  # the run has just removed a file, or a folder that glob() walks
        for file in [*out.glob(".tdm-render/*s/*.jsonl"), *out.glob(".tdm-render/done.jsonl")]:
            keys.update(re.findall(rb'"key": "(\w+)".*\n', file.read_bytes()))
    return keys


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
