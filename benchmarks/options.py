"""Flags of `tdm-bench`, named as in `vllm bench serve`, and the parsers of their values."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

from benchmarks.workload import Size, Steps
from tdm_runtime.checkpoint.folder import DEFAULT_CHECKPOINT
from tdm_runtime.cli import add_backend_arguments

USAGE_ERROR = 2
DEFAULT_NUM_PROMPTS = 200
Number = TypeVar("Number", int, float)


class Parser(argparse.ArgumentParser):
    """Argument parser that reports an error in one line."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}", file=sys.stderr)
        sys.exit(USAGE_ERROR)


def add_target_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that choose the server or engine to measure."""
    parser.add_argument(
        "--endpoint-type",
        choices=["openai", "grpc", "engine"],
        default="openai",
        help="server with the OpenAI images API, our gRPC service, or the engine in this process (%(default)s)",
    )
    parser.add_argument(
        "--base-url", default="http://127.0.0.1:8000", help="address of the server; for grpc HOST:PORT (%(default)s)"
    )
    parser.add_argument("--model", help="model id to send to the server (default: none)")
    add_engine_arguments(parser)


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the engine in this process."""
    parser.add_argument(
        "--checkpoint", type=Path, default=DEFAULT_CHECKPOINT, help="checkpoint folder of the engine (%(default)s)"
    )
    add_backend_arguments(parser)


def add_workload_arguments(parser: argparse.ArgumentParser, default_steps: str | None = None) -> None:
    """Add the flags that choose the requests."""
    parser.add_argument("--num-prompts", type=positive_int, help=f"number of requests ({DEFAULT_NUM_PROMPTS})")
    parser.add_argument(
        "--num-warmups", type=whole_number, default=20, help="requests before the measurement (%(default)s)"
    )
    parser.add_argument(
        "--seed", type=whole_number, default=0, help="seed of the schedule, picture seeds and mixtures (%(default)s)"
    )
    parser.add_argument(
        "--width", type=int_list, default=(), help="pixels; comma lists of widths and heights give a mixture of sizes"
    )
    parser.add_argument("--height", type=int_list, default=(), help="pixels, one for each --width")
    parser.add_argument(
        "--num-inference-steps",
        type=step_list,
        default=(None,) if default_steps is None else step_list(default_steps),
        help=f"a step count, auto, or a comma list ({default_steps or 'the default of the server'})",
    )
    parser.add_argument("--latency-budget-ms", type=positive_float, help="sent with every request")
    parser.add_argument("--min-inference-steps", type=positive_int, help="sent with every request")
    parser.add_argument(
        "--strength", type=positive_float, help="edit a given picture, another in each request, with this strength"
    )


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that choose the output."""
    parser.add_argument(
        "--goodput", type=goodput_ms, metavar="e2el:MS", help="count the answers within MS milliseconds"
    )
    parser.add_argument(
        "--metric-percentiles",
        type=percentile_list,
        default=(50.0, 90.0, 95.0, 99.0),
        help="of the latency (50,90,95,99)",
    )
    parser.add_argument("--save-result", action="store_true", help="write the results as JSON")
    parser.add_argument("--result-filename", type=Path, help="file for the JSON (tdm-bench-MODE.json)")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="folder for plots as PNG files")


def sizes_of(given: argparse.Namespace) -> tuple[Size | None, ...]:
    """Return the sizes given by --width and --height.

    Raises:
        ValueError: the two lists differ in length.
    """
    widths, heights = given.width, given.height
    if len(widths) != len(heights):
        raise ValueError(
            f"--width has {len(widths)} values and --height {len(heights)}; give one height for each width"
        )
    return tuple(zip(widths, heights, strict=True)) or (None,)


# -- values -----------------------------------------------------------------------------------


def positive_int(text: str) -> int:
    """Parse a whole number of at least 1."""
    value = _number(text, int, "a whole number")
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is too small; it must be at least 1")
    return value


def whole_number(text: str) -> int:
    """Parse a whole number of at least 0."""
    value = _number(text, int, "a whole number")
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is too small; it must be at least 0")
    return value


def positive_float(text: str) -> float:
    """Parse a finite number above 0."""
    value = _number(text, float, "a number")
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is out of range; it must be above 0")
    return value


def rate(text: str) -> float:
    """Parse a rate in requests/s: above 0, or inf."""
    value = _number(text, float, "a number of requests/s")
    if not value > 0:
        raise argparse.ArgumentTypeError(
            f"{text!r} requests/s is not a rate; it must be above 0, or inf for all at once"
        )
    return value


def rate_list(text: str) -> tuple[float, ...]:
    """Parse a comma list of rates."""
    return tuple(map(rate, text.split(",")))


def int_list(text: str) -> tuple[int, ...]:
    """Parse a comma list of whole numbers of at least 1."""
    return tuple(map(positive_int, text.split(",")))


def positive_list(text: str) -> tuple[float, ...]:
    """Parse a comma list of numbers above 0."""
    return tuple(map(positive_float, text.split(",")))


def step_list(text: str) -> tuple[Steps, ...]:
    """Parse a comma list of step counts or "auto"."""
    return tuple("auto" if part == "auto" else positive_int(part) for part in text.split(","))


def percentile_list(text: str) -> tuple[float, ...]:
    """Parse a comma list of percentiles."""
    values = tuple(_number(part, float, "a percentile") for part in text.split(","))
    for value in values:
        if not 0 < value <= 100:
            raise argparse.ArgumentTypeError(f"{value:g} is not a percentile; it must be above 0 and at most 100")
    return values


def goodput_ms(text: str) -> float:
    """Parse the milliseconds of "e2el:MS"."""
    metric, colon, value = text.partition(":")
    if metric != "e2el" or not colon:
        raise argparse.ArgumentTypeError(f"{text!r} is not e2el:MS; write e2el:300 for answers within 300 ms")
    return positive_float(value)


def _number(text: str, read: Callable[[str], Number], what: str) -> Number:
    try:
        return read(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}") from None
