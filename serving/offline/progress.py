"""Progress of a run: a bar on a terminal, JSON lines elsewhere. Both are on stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import IO, Any

from tqdm import tqdm

from serving.offline.chunk import Outcome

INTERVAL_S = 5.0
"""Seconds between two JSON lines."""
MAX_FAILURES = 50
"""Most failures that are shown. All are in the manifest."""


class Progress:
    """Counts pictures and shows the counts."""

    def __init__(self, stream: IO[str] | None = None, what: str = "pictures") -> None:
        """
        Args:
            what: the plural of what is made.
        """
        self._stream = stream or sys.stderr
        self._what = what
        self.counts: dict[Outcome, int] = {"made": 0, "kept": 0, "failed": 0}
        self._num_shown = 0
        self._total: int | None = None
        self._began_s = self._shown_s = time.monotonic()
        self._bar: tqdm[Any] | None = None

    def start(self) -> None:
        """Begin to show, and to count time."""
        self._began_s = self._shown_s = time.monotonic()
        if self._stream.isatty():
            self._bar = tqdm(unit=f" {self._what}", file=self._stream, dynamic_ncols=True)

    @property
    def pictures_per_s(self) -> float:
        """Pictures made a second, without those of earlier runs."""
        return self.counts["made"] / max(1e-9, time.monotonic() - self._began_s)

    def expect(self, num_units: int, share: float | None) -> None:
        """Estimate the total, after a number of pictures that are a share of the input."""
        if share:
            self._total = max(num_units, round(num_units / share))
        if self._bar is not None and self._total is not None:
            self._bar.total = self._total

    def add(self, outcome: Outcome, number: int = 1) -> None:
        """Count pictures."""
        self.counts[outcome] += number
        if self._bar is not None:
            self._bar.update(number)
        elif (now_s := time.monotonic()) - self._shown_s > INTERVAL_S:
            self._shown_s = now_s
            self._print("progress", **self.summary())

    def fail(self, failures: Sequence[str]) -> None:
        """Show why lines failed."""
        for failure in failures:
            self._num_shown += 1
            if self._num_shown > MAX_FAILURES:
                return
            more = "; further failures are in the manifest only" if self._num_shown == MAX_FAILURES else ""
            if self._bar is not None:
                self._bar.write(f"tdm-render: {failure}{more}", file=self._stream)
            else:
                self._print("failed", message=failure + more)

    def summary(self) -> dict[str, Any]:
        """Return counts, speed and time left."""
        done, rate = sum(self.counts.values()), self.pictures_per_s
        left_s = None if self._total is None or not rate else round(max(0, self._total - done) / rate, 1)
        shown: dict[str, Any] = {name: number for name, number in self.counts.items()}
        return shown | {"total": self._total, "pictures_per_s": round(rate, 2), "time_left_s": left_s}

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _print(self, event: str, **fields: Any) -> None:
        print(json.dumps({"event": event, **fields}), file=self._stream, flush=True)
