"""What `export.accelerator` measured: kept as JSON, shown as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pydantic

REPORT_FILE, TABLE_FILE = "accelerator.json", "accelerator.md"


@dataclass(frozen=True)
class Row:
    """One call, or a whole picture, one way."""

    model: str
    way: str
    part: str
    """A component, or "picture"."""
    batch: int
    ms: float | None = None
    """Median of a call that nothing else overlaps."""
    tflops: float | None = None
    """Per second."""
    of_ceiling: float | None = None
    """Share of what a large matrix product reaches on the same machine."""
    relative_l2: float | None = None
    """Against torch float32 without TF32; of pixels in levels."""
    psnr_db: float | None = None
    """Of pixels."""
    reason: str = ""
    """Why it was not measured."""


@dataclass(frozen=True)
class Report:
    """Everything that one machine measured."""

    environment: Mapping[str, str]
    ceilings_tflops: Mapping[str, float]
    rows: tuple[Row, ...] = ()

    def save(self, folder: Path) -> None:
        """Write the numbers and the table."""
        (folder / REPORT_FILE).write_bytes(_ADAPTER.dump_json(self, indent=2) + b"\n")
        (folder / TABLE_FILE).write_text(table(self), encoding="utf-8")


_ADAPTER = pydantic.TypeAdapter(Report)


def saved_report(folder: Path) -> Report | None:
    """The report that a folder holds; None where it holds none that can be read."""
    try:
        return _ADAPTER.validate_json((folder / REPORT_FILE).read_bytes())
    except (OSError, pydantic.ValidationError):
        return None


def table(report: Report) -> str:
    """The report as Markdown."""
    lines = [f"- {name}: {value}" for name, value in report.environment.items()]
    ceilings = ", ".join(f"{name} {tflops:.3g}" for name, tflops in report.ceilings_tflops.items())
    lines += [f"- matrix products, TFLOP/s: {ceilings}", ""]
    lines += [
        "| model | backend | part | batch | ms | TFLOP/s | of ceiling | relative L2 | PSNR, dB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in report.rows:
        lead = f"| {row.model} | {row.way} | {row.part} | {row.batch} "
        if row.reason:
            lines.append(f"{lead}| not measured: {row.reason.replace('|', '/')} | | | | |")
            continue
        share = "" if row.of_ceiling is None else f"{row.of_ceiling:.0%}"
        lines.append(
            f"{lead}| {_shown(row.ms, '.3g')} | {_shown(row.tflops, '.3g')} | {share} "
            f"| {_shown(row.relative_l2, '.1e')} | {_shown(row.psnr_db, '.1f')} |"
        )
    return "\n".join(lines) + "\n"


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
