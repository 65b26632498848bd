"""Figures of a run, compared with numpy, and the tables."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.compare_tables import BEGIN, END, write_between_markers
from benchmarks.load import Record, Recording
from benchmarks.machine import READS, read_ms
from benchmarks.report import figures, stage_table, terminal_table
from benchmarks.targets import Outcome
from benchmarks.workload import Request

Spans = list[tuple[float, float, float]]
spans = st.lists(st.tuples(st.floats(0, 100), st.floats(0, 2), st.floats(0.001, 5)), min_size=1, max_size=40)
"""Seconds: arrival, delay of sending, duration of the answer."""


def recording(times: Spans) -> Recording:
    records = []
    for number, (scheduled_s, late_s, took_s) in enumerate(times):
        answered_s = scheduled_s + late_s + took_s
        failure = {1: Outcome(answered_s, "queue_full", is_refused=True), 2: Outcome(answered_s, "timeout")}
        outcome = failure.get(number % 4, Outcome(answered_s, steps_used=1 + number % 3))
        records.append(Record(Request("a cat", 0), scheduled_s, scheduled_s + late_s, answered_s, outcome))
    return Recording(records)


@settings(deadline=None, max_examples=50)
@given(spans, st.floats(1, 6000))
def test_figures_equal_numpy(times: Spans, goodput_ms: float):
    measured = recording(times)
    found = figures(measured, goodput_ms, percentiles=[50, 99.9])
    latencies = np.array([1e3 * (r.answered_s - r.scheduled_s) for r in measured.records if r.outcome.error is None])
    assert found["completed"] + found["refused"] + found["failed"] == len(times)
    assert found["mean_e2el_ms"] == pytest.approx(latencies.mean())
    assert found["median_e2el_ms"] == found["p50_e2el_ms"] == pytest.approx(np.median(latencies))
    assert found["p99.9_e2el_ms"] == pytest.approx(np.percentile(latencies, 99.9))
    assert found["duration"] == max(record.answered_s for record in measured.records)
    assert found["request_throughput"] == pytest.approx(len(latencies) / found["duration"])
    good = (latencies <= goodput_ms).sum()
    assert found["goodput_share"] == pytest.approx(good / len(times))
    assert found["request_goodput"] == pytest.approx(good / found["duration"])
    assert sum(found["errors"].values()) == found["refused"] + found["failed"]
    assert found["start_times"] == sorted(found["start_times"]) and len(found["e2els"]) == len(times)
    assert json.loads(json.dumps(found)) == found


def test_an_empty_run_is_reported():
    found = figures(Recording(), goodput_ms=100.0)
    assert found["completed"] == 0 and found["median_e2el_ms"] is None
    assert "completed" in terminal_table("nothing", found)
    assert stage_table("nothing", found) == ""


def test_stages_are_listed_in_the_order_of_processing():
    stages = [{"queue": 1.0, "step 1": 2.0, "decode": 3.0, "http": 4.0}, {"queue": 3.0, "step 1": 2.0, "step 2": 5.0}]
    records = [Record(Request("a cat", 0), 0, 0, 1, Outcome(1, stages_ms=found)) for found in stages]
    found = figures(Recording(records))["stages_ms"]
    assert list(found) == ["queue", "step 1", "step 2", "decode", "http", "round trip"]
    assert found["queue"]["p50"] == 2.0 and found["round trip"]["p99"] == 1e3


def test_tables_replace_the_text_between_the_markers(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    for _ in range(2):
        write_between_markers(page, "tables\n")
        assert page.read_text() == f"before\n{BEGIN}\ntables\n{END}\nafter\n"


@pytest.mark.parametrize("text", ["", BEGIN, END + BEGIN])
def test_a_page_without_markers_is_refused_and_unchanged(tmp_path: Path, text: str):
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(ValueError, match="lacks the lines"):
        write_between_markers(page, "tables\n")
    assert page.read_text() == text


def test_memory_is_read_after_the_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses_s: list[float] = []
    monkeypatch.setattr("benchmarks.machine.time.sleep", pauses_s.append)
    assert read_ms(0.3) > 0
    assert pauses_s == [0.3] * (READS + 1)
