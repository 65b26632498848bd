"""Report of `export.accelerator`, saved as JSON and shown as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pydantic

REPORT_FILE, TABLE_FILE = "accelerator.json", "accelerator.md"


@dataclass(frozen=True)
class Row:
    """Measurement of one call, or of a whole picture, in one way."""

    model: str
    way: str
    part: str
    """Component, or "picture"."""
    batch: int
    ms: float | None = None
    """Median time of a call on an idle device, in milliseconds."""
    tflops: float | None = None
    """Reached rate, in TFLOP/s."""
    of_ceiling: float | None = None
    """Share of the rate of a large matrix product on the same machine."""
    relative_l2: float | None = None
    """Relative L2 distance to torch float32 without TF32; pixels count in levels of 255."""
    psnr_db: float | None = None
    """PSNR against the same reference, for outputs that are pixels."""
    reason: str = ""
    """Reason why it was not measured; empty if it was."""


@dataclass(frozen=True)
class Report:
    """All measurements of one machine."""

    environment: Mapping[str, str]
    ceilings_tflops: Mapping[str, float]
    rows: tuple[Row, ...] = ()

    def save(self, folder: Path) -> None:
        """Write the report as JSON and as a table."""
        (folder / REPORT_FILE).write_bytes(_ADAPTER.dump_json(self, indent=2) + b"\n")
        (folder / TABLE_FILE).write_text(table(self), encoding="utf-8")


_ADAPTER = pydantic.TypeAdapter(Report)


def saved_report(folder: Path) -> Report | None:
    """Return the report in a folder, or None if there is no readable report."""
    try:
        return _ADAPTER.validate_json((folder / REPORT_FILE).read_bytes())
    except (OSError, pydantic.ValidationError):
        return None


def table(report: Report) -> str:
    """Return the report as Markdown."""
    lines = [f"- {name}: {value}" for name, value in report.environment.items()]
    ceilings = ", ".join(f"{name} {tflops:.3g}" for name, tflops in report.ceilings_tflops.items())
    lines += [f"- matrix products, TFLOP/s: {ceilings}", ""]
    lines += [
        "| model | backend | part | batch | ms | TFLOP/s | share of ceiling | relative L2 | PSNR, dB |",
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
