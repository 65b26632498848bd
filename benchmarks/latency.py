"""Single-stream latency of a running server, by stage.

    make serve &
    .venv/bin/python -m benchmarks.latency --num-prompts 200

One connection, one request at a time, a fresh prompt each, so the text stage is a cache miss. The
stages are the server's own (`timings`); "http" is the client's round trip less the server's total.
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import sys
import time
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.machine import machine

SUBJECTS = ("red heart", "cat", "rocket", "pizza", "penguin", "butterfly", "tree", "guitar")
BACKGROUNDS = ("white", "black", "gray", "red", "orange", "yellow", "green", "blue", "purple", "pink")


@dataclass(frozen=True)
class Measurement:
    """One request."""

    round_trip_ms: float
    stages_ms: Mapping[str, float]
    """Stage -> duration; they add up to the round trip."""


def ask(connection: http.client.HTTPConnection, prompt: str, steps: int) -> Measurement:
    """Send one request and split its time.

    Raises:
        RuntimeError: the server answered with an error.
    """
    body = json.dumps({"prompt": prompt, "num_inference_steps": steps})
    started_s = time.perf_counter()
    connection.request("POST", "/v1/images/generations", body, {"content-type": "application/json"})
    response = connection.getresponse()
    answer: dict[str, Any] = json.loads(response.read())
    round_trip_ms = 1e3 * (time.perf_counter() - started_s)
    if response.status != 200:
        raise RuntimeError(f"the server answered {response.status}: {answer['error']['message']}")
    timings = answer["timings"]
    stages = {"queue": timings["queue_ms"], "text": timings["text_ms"]}
    stages |= {f"step {n}": step_ms for n, step_ms in enumerate(timings["steps_ms"], 1)}
    stages |= {"decode": timings["decode_ms"], "encode": timings["encode_ms"]}
    stages["engine hand-over"] = timings["total_ms"] - sum(stages.values())
    stages["http"] = round_trip_ms - timings["total_ms"]
    return Measurement(round_trip_ms, stages)


def print_table(steps: int, measurements: Sequence[Measurement]) -> None:
    """Print medians by stage as a Markdown table."""
    print(f"| K = {steps}, ms | p50 | p90 | p99 |\n|---|---|---|---|")
    rows = {name: [m.stages_ms[name] for m in measurements] for name in measurements[0].stages_ms}
    rows["round trip"] = [m.round_trip_ms for m in measurements]
    for name, values in rows.items():
        cuts = statistics.quantiles(values, n=100, method="inclusive")
        print(f"| {name} | {cuts[49]:.2f} | {cuts[89]:.2f} | {cuts[98]:.2f} |")


def main() -> int:
    """Run the command. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.latency", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--base-url", default="http://127.0.0.1:8000")
    parser.add_argument("--num-prompts", type=int, default=200, help="measured requests a step count (%(default)s)")
    parser.add_argument("--num-warmups", type=int, default=20)
    parser.add_argument("--num-inference-steps", type=int, nargs="+", default=[1, 4])
    given = parser.parse_args()
    if given.num_prompts < 2:
        parser.error(f"--num-prompts is {given.num_prompts}; percentiles need at least 2")
    address = urllib.parse.urlsplit(given.base_url)
    connection = http.client.HTTPConnection(address.hostname or "127.0.0.1", address.port or 80, timeout=60)
    print(machine())
    for steps in given.num_inference_steps:
        prompts = [
            f"a {SUBJECTS[n % len(SUBJECTS)]} on {BACKGROUNDS[n % len(BACKGROUNDS)]}, number {n} of {steps}"
            for n in range(given.num_warmups + given.num_prompts)
        ]
        measurements = [ask(connection, prompt, steps) for prompt in prompts]
        print_table(steps, measurements[given.num_warmups :])
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
