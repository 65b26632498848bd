"""A short soak of a real server, and tests that the soak detects growth and failures."""

from __future__ import annotations

import pytest

from benchmarks.cli import main
from benchmarks.soak import Bounds, Diary, Look, compare
from tests.serving.conftest import RunningServer

DURATION_S = 10


def looks(memory: list[float], threads: float = 9.0, files: float = 70.0) -> list[Look]:
    return [Look(float(at), one, threads, files, 0.0, None) for at, one in enumerate(memory)]


def test_a_server_is_steady_under_a_mixed_load(tdm_server: RunningServer, capsys: pytest.CaptureFixture[str]) -> None:
    """The bound on memory is wide, because caches still fill during such a short run."""
    flags = ["--duration-s", str(DURATION_S), "--sample-s", "0.5", "--warm-up", "0.3", "--max-growth-mib", "200"]
    status = main(["soak", "--base-url", tdm_server.url, "--max-concurrency", "4", *flags])
    printed = capsys.readouterr()
    assert status == 0, printed.out + printed.err
    for visit in ("make_picture 200", "watch_stream 200", "leave_stream 200", "give_up", "send_nonsense 400"):
        assert visit in printed.out
    assert "connect_anew 404" in printed.out and "the server is steady" in printed.out


def test_quarters_are_compared_after_the_warm_up() -> None:
    rising = [0.0] * 20 + [1000.0] * 20 + [1040.0] * 40 + [1060.0] * 20
    memory, threads, files = compare(looks(rising), 0.2, Bounds())
    assert (memory.first, memory.last, memory.allowed) == (1000.0, 1060.0, 50.0)
    assert not memory.is_kept and threads.is_kept and files.is_kept


def test_a_leak_of_open_files_is_detected_when_memory_is_steady() -> None:
    leaking = [Look(float(at), 1000.0, 9.0, 70.0 + at, 0.0, None) for at in range(100)]
    assert [row.is_kept for row in compare(leaking, 0.2, Bounds())] == [True, True, False]


def test_memory_of_all_processes_is_compared_for_a_server_that_the_soak_started() -> None:
    ours = [Look(float(at), 1000.0, 9.0, 70.0, 0.0, 2000.0 + 2 * at) for at in range(100)]
    assert [row.is_kept for row in compare(ours, 0.0, Bounds())] == [True, True, True, False]


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="3 samples after the warm-up; at least 4 are needed"):
        compare(looks([1.0, 2.0, 3.0]), 0.0, Bounds())


@pytest.mark.parametrize(("status", "is_fault"), [(200, False), (429, False), (503, False), (500, True), (504, True)])
def test_an_answer_with_5xx_except_503_is_a_fault(status: int, is_fault: bool) -> None:
    diary = Diary()
    diary.note("make_picture", status)
    assert diary.answers == {f"make_picture {status}": 1}
    assert bool(diary.faults) is is_fault


def test_an_unreachable_server_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["soak", "--base-url", "http://127.0.0.1:9", "--duration-s", "1"]) == 2
    assert capsys.readouterr().err.startswith("tdm-bench soak: ")
