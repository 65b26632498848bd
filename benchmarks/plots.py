"""Plots as PNG files. matplotlib is imported only to draw one, because measuring does not need it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Palette of Okabe and Ito, which is safe for colour-blind readers."""
MARKERS = "osD^vPX"
SIZE_INCHES = (7.2, 4.4)


@dataclass(frozen=True)
class Load:
    """One point of a concurrency sweep."""

    concurrency: int
    throughput: float
    """Requests/s."""
    median_ms: float


@dataclass(frozen=True)
class Quality:
    """Latency and quality of one step count."""

    num_inference_steps: int
    median_ms: float
    psnr_db: float | None
    """PSNR against the picture of the largest step count and the same seed; None for that step count itself."""


def plot_latency_cdf(
    file: Path, latencies_ms: Mapping[str, Sequence[float]], slo_ms: float | None = None, title: str = "Latency"
) -> None:
    """Plot the share of answers within a latency, with one line per label."""
    with _figure(file, title, "latency, ms", "share of answers") as axes:
        for number, (label, values) in enumerate(latencies_ms.items()):
            ordered = np.sort(values)
            shares = np.arange(1, len(ordered) + 1) / len(ordered)
            axes.step(ordered, shares, where="post", label=label, color=_colour(number))
        if slo_ms is not None:
            axes.axvline(slo_ms, color="0.4", linestyle="--", linewidth=1, label=f"SLO {slo_ms:.0f} ms")
        axes.set_ylim(0, 1.02)
        _logarithmic(axes, "x")


def plot_throughput_latency(file: Path, sweeps: Mapping[str, Sequence[Load]]) -> None:
    """Plot median latency against throughput, with one point per concurrency."""
    axis = "throughput, pictures/s (small numbers: requests in flight)"
    with _figure(file, "Throughput and latency, closed loop", axis, "median latency, ms") as axes:
        for number, (label, loads) in enumerate(sweeps.items()):
            x, y = [load.throughput for load in loads], [load.median_ms for load in loads]
            axes.plot(x, y, marker=MARKERS[number % len(MARKERS)], markersize=5, label=label, color=_colour(number))
            for load in loads:
                point = (load.throughput, load.median_ms)
                axes.annotate(
                    str(load.concurrency), point, textcoords="offset points", xytext=(5, 4), fontsize=7, color="0.35"
                )
        axes.set_xlim(left=0)
        _logarithmic(axes, "y")


def plot_goodput(
    file: Path, shares: Mapping[str, Mapping[float, float]], slo_ms: float, title: str = "Answers within the SLO"
) -> None:
    """Plot the share of all requests answered within the SLO against the arrival rate, with one line per label."""
    axis = f"share of all requests within {slo_ms:.0f} ms"
    with _figure(file, title, "arrival rate, requests/s", axis) as axes:
        for number, (label, points) in enumerate(shares.items()):
            rates = sorted(points)
            y = [points[rate] for rate in rates]
            axes.plot(rates, y, marker=MARKERS[number % len(MARKERS)], markersize=5, label=label, color=_colour(number))
        axes.set_ylim(-0.03, 1.05)
        axes.set_xlim(left=0)


def plot_quality_latency(file: Path, points: Sequence[Quality]) -> None:
    """Plot PSNR against the picture of the largest step count over latency, with one point per step count."""
    measured = [(point, point.psnr_db) for point in points if point.psnr_db is not None]
    most = max(point.num_inference_steps for point in points)
    axis = f"PSNR against K = {most}, same seed, dB"
    with _figure(
        file, "Quality and latency by step count", "median latency, ms (in process, one at a time)", axis, legend=False
    ) as axes:
        x, y = [point.median_ms for point, _ in measured], [psnr_db for _, psnr_db in measured]
        axes.plot(x, y, marker="o", color=_colour(0))
        for point, psnr_db in measured:
            _name_point(axes, f"K = {point.num_inference_steps}", (point.median_ms, psnr_db))
        for point in points:
            if point.psnr_db is None:
                axes.axvline(point.median_ms, color="0.4", linestyle="--", linewidth=1)
                label = f"K = {point.num_inference_steps}: the reference"
                axes.text(point.median_ms, 0.5, f"{label} ", transform=axes.get_xaxis_transform(), ha="right")
        axes.set_xlim(0, 1.1 * max(point.median_ms for point in points))
        axes.margins(y=0.15)


def _logarithmic(axes: Axes, direction: Literal["x", "y"]) -> None:
    """Make an axis logarithmic with plain numbers, so that fast and slow contenders fit into one plot."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set(**{f"{direction}scale": "log"})
    axis = axes.xaxis if direction == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _name_point(axes: Axes, name: str, point: tuple[float, float]) -> None:
    axes.annotate(name, point, textcoords="offset points", xytext=(8, -10))


@contextmanager
def _figure(file: Path, title: str, x: str, y: str, legend: bool = True) -> Iterator[Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(SIZE_INCHES, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    yield axes
    if legend:
        figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=3)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=140)


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]
