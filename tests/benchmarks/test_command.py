"""The `tdm-bench` command: its errors, its measurements and its output."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.cli import main
from benchmarks.compare_tables import BEGIN, END, to_markdown
from benchmarks.contenders import Contender, NotRunError, running
from benchmarks.machine import machine
from benchmarks.phases import SCENARIOS, Plan, joining, measure_server, ours_within_slo, peer_within_slo
from benchmarks.workload import arrivals_within
from tdm_runtime.model.loaded_model import LoadedModel
from tests.benchmarks.small_server import SmallServer

SMALL_SERVER = "tests.benchmarks.small_server"
QUICK = Plan.quick((16, 16), seed=0, budget_factor=0.85)
TORCH = ("--backend", "torch", "--threads", "1")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["latency", "--base-url", "http://127.0.0.1:9"], "http://127.0.0.1:9 does not answer"),
        (["latency", "--base-url", "nowhere"], "nowhere does not answer"),
        (["server", "--request-rate", "0"], "'0' requests/s is not a rate"),
        (["server", "--request-rate", "5,-1"], "'-1' requests/s is not a rate"),
        (["server", "--request-rate", "fast"], "'fast' is not a number"),
        (["server", "--duration-s", "3"], "inf needs a number of requests"),
        (["server", "--burstiness", "0"], "'0' is out of range"),
        (["throughput", "--max-concurrency", "0"], "'0' is too small"),
        (["throughput", "--metric-percentiles", "50,101"], "101 is not a percentile"),
        (["throughput", "--metric-percentiles", "0"], "0 is not a percentile"),
        (["offline", "--goodput", "300"], "'300' is not e2el:MS"),
        (["offline", "--goodput", "ttft:300"], "'ttft:300' is not e2el:MS"),
        (["offline", "--goodput", "e2el:-3"], "'-3' is out of range"),
        (["offline", "--num-inference-steps", "4,many"], "'many' is not a whole number"),
        (["offline", "--width", "64,96", "--height", "64"], "--width has 2 values and --height 1"),
        (["offline", "--endpoint-type", "engine", "--checkpoint", "/nowhere"], "/nowhere"),
        (["compare", "--write-docs", "/nowhere.md"], "lacks the lines"),
        (["compare", "--only", "everything"], "invalid choice"),
        ([], "MODE"),
    ],
)
def test_a_usage_error_prints_one_line_and_exits_with_2(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
):
    try:
        status = main(arguments)
    except SystemExit as stop:
        status = stop.code
    printed = capsys.readouterr().err
    assert status == 2
    assert sentence in printed and printed.count("\n") == 1


def test_latency_mode_reports_the_stages_of_a_server(
    server: SmallServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "result.json"
    command = ["latency", "--base-url", server.base_url, "--num-prompts", "6", "--num-warmups", "2"]
    command += ["--num-inference-steps", "1,3", "--width", "24", "--height", "16"]
    command += ["--goodput", "e2el:60000", "--metric-percentiles", "25,99.5", "--result-filename", str(file)]
    assert main([*command, "--plot", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "| http |" in printed and "| step 3 |" in printed and machine().strip() in printed
    result = json.loads(file.read_text())
    assert [run["num_inference_steps"] for run in result["runs"]] == [1, 3]
    for run in result["runs"]:
        assert run["completed"] == 6 and run["goodput_share"] == 1 and run["errors"] == {}
        assert run["p25_e2el_ms"] <= run["p99.5_e2el_ms"]
        assert run["stages_ms"]["http"]["p50"] > 0
    assert result["runs"][1]["steps_used"] == {"3": 6}
    assert result["environment"]["served"]["backend"] == server.engine.model.backend
    assert (tmp_path / "latency.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "plot"),
    [
        (["throughput", "--max-concurrency", "1,4", "--duration-s", "0.3"], "throughput.png"),
        (["server", "--request-rate", "40,80", "--num-prompts", "12", "--goodput", "e2el:500"], "goodput.png"),
        (["offline", "--num-prompts", "140", "--num-inference-steps", "1"], "latency.png"),
        (["latency", "--num-prompts", "2", "--num-inference-steps", "auto"], "quality.png"),
    ],
)
def test_every_mode_measures_the_engine_in_process_and_draws_its_plot(
    arguments: list[str], plot: str, tiny_checkpoint: Path, tmp_path: Path
):
    file = tmp_path / "result.json"
    command = [*arguments, "--endpoint-type", "engine", "--checkpoint", str(tiny_checkpoint), *TORCH]
    command += ["--num-warmups", "2", "--plot", str(tmp_path), "--save-result", "--result-filename", str(file)]
    assert main(command) == 0
    assert (tmp_path / plot).is_file()
    result = json.loads(file.read_text())
    for run in result.get("runs", [result]):
        assert run["completed"] == len(run["e2els"]) > 0
    if arguments[0] == "offline":
        assert result["completed"] == 140


def test_an_interrupted_run_reports_its_results_so_far(server: SmallServer, capsys: pytest.CaptureFixture[str]):
    def interrupt() -> None:
        until_s = time.monotonic() + 60
        while server.answered < 8 and time.monotonic() < until_s:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    command = ["server", "--base-url", server.base_url, "--request-rate", "40", "--num-prompts", "5000"]
    # A process started in the background ignores SIGINT, so install the handler of a terminal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main([*command, "--num-warmups", "1"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    thread.join()
    printed = capsys.readouterr()
    assert "interrupted" in printed.err and "throughput, requests/s" in printed.out


def test_compare_writes_its_tables_between_the_markers(tiny_checkpoint: Path, tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(f"# Page\n{BEGIN}\n{END}\nend\n")
    command = ["compare", "--quick", "--checkpoint", str(tiny_checkpoint), *TORCH, "--peers-python", sys.executable]
    command += ["--output", str(tmp_path / "out"), "--write-docs", str(page)]
    assert main([*command, "--only", "contenders", "overhead", "quality", "--contenders", "engine in process"]) == 0
    text = page.read_text()
    assert text.startswith("# Page") and text.endswith(f"{END}\nend\n")
    for said in ("engine in process", "between two steps", "dB against K = 4"):
        assert said in text
    assert main([*command, "--only", "slo"]) == 0  # phases that are not measured again stay
    assert "no such peer was measured" in page.read_text() and "between two steps" in page.read_text()
    result = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert result["contenders"]["engine in process"]["throughput"] > 0
    assert (tmp_path / "out" / "quality.png").is_file()


def test_a_peer_whose_environment_cannot_be_made_is_listed_as_not_run(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    asked: list[str] = []

    def interpreter_of(extra: str) -> str:
        asked.append(extra)
        raise OSError("openvino-genai cannot be installed into build/peers-genai: there is no network")

    monkeypatch.setattr("benchmarks.compare.interpreter_of", interpreter_of)
    command = ["compare", "--quick", "--checkpoint", str(tiny_checkpoint), *TORCH, "--output", str(tmp_path)]
    command += ["--only", "contenders", "--contenders", "litserve_batch openvino-genai", "engine in process"]
    assert main(command) == 0
    assert asked == ["peers-genai"]
    said = capsys.readouterr().out
    assert "- litserve_batch openvino-genai: not run: openvino-genai cannot be installed into" in said
    assert "| engine in process |" in said


def test_a_contender_is_started_measured_and_stopped(tiny_checkpoint: Path, tmp_path: Path):
    arguments = ("--backend", "ours", "--checkpoint", str(tiny_checkpoint))
    contender = Contender("a peer", SMALL_SERVER, arguments, "/health", "ours")
    plan = replace(QUICK, load_s=0.2, warm_up_s=0.1)
    with running(contender, tmp_path) as base_url:
        found = asyncio.run(measure_server(base_url, plan))
    assert found["unloaded_ms"] > 0 and found["throughput"] > 0
    with pytest.raises(ConnectionError):
        asyncio.run(measure_server(base_url, plan))


def test_the_slo_phase_gives_both_servers_the_same_arrivals(server: SmallServer):
    plan = replace(QUICK, arrivals_s=0.25, warm_up_s=0.01)
    peer = {"unloaded_ms": 2000.0, "throughput": 30.0}  # a budget that even a busy machine can meet
    theirs = asyncio.run(peer_within_slo(server.base_url, peer, plan))
    auto, fixed = asyncio.run(ours_within_slo(server.base_url, peer, plan))
    for scenario, *runs in zip(SCENARIOS, theirs, auto, fixed, strict=True):
        arrivals = arrivals_within(0.25, 30.0 * scenario.load, scenario.burstiness, plan.seed)
        assert all(run["start_times"] == arrivals and run["goodput_e2el_ms"] == 6000.0 for run in runs)
        assert not any(run["failed"] for run in runs)
    pair = {"name": "a peer", "slo_ms": 6000.0, "capacity": 30.0, "peer": theirs, "auto": auto, "fixed": fixed}
    tables = to_markdown({"measured": {}, "slo": {"our backend": pair, "none": {"not_run": "it is absent"}}})
    assert "120 %, burstiness 0.25" in tables and "it is absent" in tables


def test_the_joining_phase_gives_both_engines_the_same_arrivals(tiny_model: LoadedModel):
    plan = replace(QUICK, arrivals_s=0.3, load_s=0.2, warm_up_s=0.01)
    found = asyncio.run(joining(tiny_model, plan))
    assert found["whole"]["start_times"] == found["joining"]["start_times"]
    assert found["whole"]["completed"] == found["joining"]["completed"] > 0
    assert "whole requests / joining" in to_markdown({"measured": {}, "joining": found})


@pytest.mark.parametrize(
    ("module", "sentence"),
    [(SMALL_SERVER, "^ours is not installed; install it$"), ("tests.benchmarks.absent", "it ended with 1: .*absent")],
)
def test_a_contender_that_cannot_run_says_why(module: str, sentence: str, tmp_path: Path):
    contender = Contender("a peer", module, ("--backend", "ours"), "/health", "ours")
    with pytest.raises(NotRunError, match=sentence), running(contender, tmp_path):
        pass
