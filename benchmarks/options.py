"""Flags of `tdm-bench`, in the style of `vllm bench serve`, and how their values are read."""

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
    """Says what is wrong in one sentence."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}", file=sys.stderr)
        sys.exit(USAGE_ERROR)


def add_target_arguments(parser: argparse.ArgumentParser) -> None:
    """What is measured."""
    parser.add_argument(
        "--endpoint-type",
        choices=["openai", "grpc", "engine"],
        default="openai",
        help="a server of the OpenAI images API, our own gRPC service, or the engine in this process (%(default)s)",
    )
    parser.add_argument(
        "--base-url", default="http://127.0.0.1:8000", help="of the server; grpc: HOST:PORT (%(default)s)"
    )
    parser.add_argument("--model", help="sent to the server; not sent by default")
    add_engine_arguments(parser)


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Of the engine in this process."""
    parser.add_argument("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT, help="engine: folder (%(default)s)")
    add_backend_arguments(parser)


def add_workload_arguments(parser: argparse.ArgumentParser, default_steps: str | None = None) -> None:
    """What is asked."""
    parser.add_argument("--num-prompts", type=positive_int, help=f"requests ({DEFAULT_NUM_PROMPTS})")
    parser.add_argument("--num-warmups", type=whole_number, default=20, help="requests before (%(default)s)")
    parser.add_argument("--seed", type=whole_number, default=0, help="of schedule, seeds and mixtures (%(default)s)")
    parser.add_argument("--width", type=int_list, default=(), help="pixels; a comma list with --height is a mixture")
    parser.add_argument("--height", type=int_list, default=(), help="pixels, one for each --width")
    parser.add_argument(
        "--num-inference-steps",
        type=step_list,
        default=(None,) if default_steps is None else step_list(default_steps),
        help="a step count, auto, or a comma list (server's own)" if default_steps is None else f"({default_steps})",
    )
    parser.add_argument("--latency-budget-ms", type=positive_float, help="sent with every request")
    parser.add_argument("--min-inference-steps", type=positive_int, help="sent with every request")


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """What is told."""
    parser.add_argument("--goodput", type=goodput_ms, metavar="e2el:MS", help="count answers within MS milliseconds")
    parser.add_argument(
        "--metric-percentiles", type=percentile_list, default=(50.0, 90.0, 95.0, 99.0), help="(50,90,95,99)"
    )
    parser.add_argument("--save-result", action="store_true", help="write the figures as JSON")
    parser.add_argument("--result-filename", type=Path, help="where (tdm-bench-MODE.json)")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="write plots as PNG there")


def sizes_of(given: argparse.Namespace) -> tuple[Size | None, ...]:
    """The sizes that --width and --height ask for.

    Raises:
        ValueError: they do not pair up.
    """
    widths, heights = given.width, given.height
    if len(widths) != len(heights):
        raise ValueError(
            f"--width has {len(widths)} values and --height {len(heights)}; give one height for each width"
        )
    return tuple(zip(widths, heights, strict=True)) or (None,)


# -- values -----------------------------------------------------------------------------------


def positive_int(text: str) -> int:
    """1, 2, ..."""
    value = _number(text, int, "a whole number")
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is too small; it must be at least 1")
    return value


def whole_number(text: str) -> int:
    """0, 1, ..."""
    value = _number(text, int, "a whole number")
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is too small; it must be at least 0")
    return value


def positive_float(text: str) -> float:
    """Above 0 and finite."""
    value = _number(text, float, "a number")
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is out of range; it must be above 0")
    return value


def rate(text: str) -> float:
    """Above 0, or inf."""
    value = _number(text, float, "a number of requests/s")
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r} requests/s is no rate; it must be above 0, or inf for all at once")
    return value


def rate_list(text: str) -> tuple[float, ...]:
    """Rates between commas."""
    return tuple(map(rate, text.split(",")))


def int_list(text: str) -> tuple[int, ...]:
    """Whole numbers from 1 between commas."""
    return tuple(map(positive_int, text.split(",")))


def step_list(text: str) -> tuple[Steps, ...]:
    """Step counts or "auto" between commas."""
    return tuple("auto" if part == "auto" else positive_int(part) for part in text.split(","))


def percentile_list(text: str) -> tuple[float, ...]:
    """Percentiles between commas."""
    values = tuple(_number(part, float, "a percentile") for part in text.split(","))
    for value in values:
        if not 0 < value <= 100:
            raise argparse.ArgumentTypeError(f"{value:g} is no percentile; they are above 0 and up to 100")
    return values


def goodput_ms(text: str) -> float:
    """The milliseconds of "e2el:MS"."""
    metric, colon, value = text.partition(":")
    if metric != "e2el" or not colon:
        raise argparse.ArgumentTypeError(f"{text!r} is not e2el:MS; write e2el:300 for answers within 300 ms")
    return positive_float(value)


def _number(text: str, read: Callable[[str], Number], what: str) -> Number:
    try:
        return read(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}") from None
