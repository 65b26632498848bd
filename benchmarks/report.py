"""Figures of a run, as JSON, as a table for the terminal and as Markdown."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.load import Record, Recording
from tdm_runtime.whole_file import write_whole

DEFAULT_PERCENTILES = (50.0, 90.0, 95.0, 99.0)
STAGE_PERCENTILES = (50.0, 90.0, 99.0)

Figures = dict[str, Any]
"""JSON values of one run; `docs/benchmarks.md` lists the fields."""


def figures(
    recording: Recording, goodput_ms: float | None = None, percentiles: Sequence[float] = DEFAULT_PERCENTILES
) -> Figures:
    """Summarise a run, including rejected and failed requests.

    Args:
        goodput_ms: latency limit for goodput, in milliseconds; None measures no goodput.
        percentiles: latency percentiles to report, above 0 and at most 100.
    """
    records = sorted(recording.records, key=lambda record: record.scheduled_s)
    completed = [record for record in records if record.is_completed]
    duration_s = recording.duration_s
    latencies_ms = [1e3 * record.e2el_s for record in completed]
    found: Figures = {
        "duration": duration_s,
        "completed": len(completed),
        "failed": sum(not r.is_completed and not r.outcome.is_refused for r in records),
        "refused": sum(r.outcome.is_refused for r in records),
        "request_throughput": _ratio(len(completed), duration_s),
        "request_goodput": None,
        "goodput_share": None,
        "mean_e2el_ms": float(np.mean(latencies_ms)) if latencies_ms else None,
        "median_e2el_ms": _percentile(latencies_ms, 50),
    }
    for percentile in percentiles:
        found[f"p{percentile:g}_e2el_ms"] = _percentile(latencies_ms, percentile)
    if goodput_ms is not None:
        good = sum(latency_ms <= goodput_ms for latency_ms in latencies_ms)
        found["request_goodput"] = _ratio(good, duration_s)
        found["goodput_share"] = _ratio(good, len(records))
        found["goodput_e2el_ms"] = goodput_ms
    steps_used = [record.outcome.steps_used for record in completed if record.outcome.steps_used is not None]
    kept = [record.outcome.is_budget_kept for record in completed if record.outcome.is_budget_kept is not None]
    found |= {
        "budgets_kept_share": _ratio(sum(kept), len(kept)) if kept else None,
        "stages_ms": _stages(completed),
        "steps_used": {str(steps): count for steps, count in sorted(Counter(steps_used).items())},
        "mean_steps_used": float(np.mean(steps_used)) if steps_used else None,
        "errors": dict(Counter(record.outcome.error for record in records if record.outcome.error)),
        "e2els": [record.e2el_s if record.is_completed else None for record in records],
        "start_times": [record.scheduled_s for record in records],
        "max_send_delay_ms": max((1e3 * (r.sent_s - r.scheduled_s) for r in records), default=0.0),
    }
    return found


def _stages(completed: Sequence[Record]) -> dict[str, dict[str, float]]:
    """Return stage -> p50, p90, p99 over the answers that have it. "round trip" counts from sending, not arrival."""
    samples: dict[str, list[float]] = {}
    for record in completed:
        if record.outcome.stages_ms:
            round_trip = {"round trip": 1e3 * (record.answered_s - record.sent_s)}
            for stage, ms in {**record.outcome.stages_ms, **round_trip}.items():
                samples.setdefault(stage, []).append(ms)
    # Answers of few steps name "decode" before others name "step 4", so the order is fixed here.
    steps = sorted((stage for stage in samples if stage.startswith("step ")), key=lambda stage: int(stage[5:]))
    order = ["queue", "text", "image", *steps, "decode", "encode", "engine hand-over", "http", "grpc", "round trip"]
    return {
        stage: {f"p{p:g}": float(np.percentile(samples[stage], p)) for p in STAGE_PERCENTILES}
        for stage in order
        if stage in samples
    }


def _percentile(values: Sequence[float], percentile: float) -> float | None:
    return float(np.percentile(values, percentile)) if values else None


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


# -- tables -------------------------------------------------------------------------------


def terminal_table(title: str, found: Figures) -> str:
    """Return the figures of a run, one per line."""
    rows = [
        ("duration, s", found["duration"]),
        ("completed", found["completed"]),
        ("refused", found["refused"]),
        ("failed", found["failed"]),
        ("throughput, requests/s", found["request_throughput"]),
    ]
    if found["goodput_share"] is not None:
        limit = f"within {found['goodput_e2el_ms']:g} ms"
        rows += [
            (f"goodput {limit}, requests/s", found["request_goodput"]),
            (f"share of all requests {limit}", found["goodput_share"]),
        ]
    rows += [(f"latency {name.removesuffix('_e2el_ms')}, ms", found[name]) for name in found if _is_latency(name)]
    if found["budgets_kept_share"] is not None:
        rows.append(("share of latency budgets met", found["budgets_kept_share"]))
    if found["mean_steps_used"] is not None:
        shares = ", ".join(f"{count} of K = {steps}" for steps, count in found["steps_used"].items())
        rows += [("steps used, mean", found["mean_steps_used"]), ("steps used", shares)]
    rows += [(f"error {code}", count) for code, count in found["errors"].items()]
    width = max(len(name) for name, _ in rows)
    return "\n".join([f"== {title} ==", *(f"{name:<{width}}  {cell(value, 2)}" for name, value in rows)])


def _is_latency(name: str) -> bool:
    return name.endswith("_e2el_ms") and not name.startswith(("goodput", "median"))


def stage_table(title: str, found: Figures) -> str:
    """Return the stages of a run as a Markdown table, or "" if the answers have no timings."""
    stages = found["stages_ms"]
    if not stages:
        return ""
    rows = [[stage, *(cell(ms, 2) for ms in values.values())] for stage, values in stages.items()]
    return markdown_table([f"{title}, ms", *(f"p{p:g}" for p in STAGE_PERCENTILES)], rows)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table. Cells are not escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(value: object, digits: int = 1) -> str:
    """Return the text of a table cell; a dash stands for None."""
    if value is None:
        return "-"
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a result atomically: the whole file or nothing."""
    write_whole(file, (json.dumps(content, indent=1) + "\n").encode())
