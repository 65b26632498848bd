"""The simulation runs the real scheduler: known cases come out as computed by hand, and nothing is lost on the way."""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.cli import main
from benchmarks.plan.command import read_trace
from benchmarks.plan.cost_table import TABLES, CostTable, SizeCosts, read_table
from benchmarks.plan.fleet import Fleet, Result, Simulation
from benchmarks.plan.profile import RecordedCosts, paces_of, profile
from benchmarks.report import figures
from benchmarks.targets import running_engine
from benchmarks.workload import Steps, Workload, arrivals_within
from tdm_runtime.engine.engine import EngineConfig
from tdm_runtime.model.artifacts import BackendConfig
from tdm_runtime.model.choice import load_model
from tdm_runtime.scheduling.cost_model import Kind

TABLE = CostTable(
    name="tiny",
    machine="none",
    source="made up",
    step_counts=(1, 2, 4),
    sizes={"64x64": SizeCosts({1: 0.010, 2: 0.016, 4: 0.028}, {1: 0.005, 2: 0.008})},
    text_s={1: 0.002, 4: 0.004},
    encode_s=0.001,
    front_s=0.004,
)
LONE_S = 0.004 + 0.002 + 4 * 0.010 + 0.005 + 0.001


def simulated(
    rate: float, fleet: Fleet = Fleet(), seconds: float = 20, steps: Steps = "auto", table: CostTable = TABLE
) -> Result:
    workload = Workload(steps=(steps,), latency_budget_ms=3e3 * LONE_S)
    return Simulation([table], fleet).run(arrivals_within(seconds, rate), workload.requests())


def goodput(result: Result) -> float:
    return float(figures(result.recording, 3e3 * LONE_S)["goodput_share"])


def test_a_lone_request_takes_the_sum_of_its_calls() -> None:
    result = Simulation([TABLE], Fleet()).run([0.0, 5.0], Workload(steps=(4,)).requests())
    assert [record.e2el_s for record in result.recording.records] == pytest.approx([LONE_S, LONE_S])
    assert TABLE.unloaded_s() == pytest.approx(LONE_S)


def test_further_samples_cost_the_share_that_is_asked_for() -> None:
    table = TABLE.with_further_samples(0.5)
    assert table.sizes["64x64"].denoise_s == pytest.approx({1: 0.010, 2: 0.015, 4: 0.025})
    assert table.text_s == pytest.approx({1: 0.002, 4: 0.005})
    assert table.unloaded_s() == TABLE.unloaded_s()


@pytest.mark.parametrize("overhead_s", [0.0, 0.02])
def test_at_saturation_a_replica_makes_its_capacity(overhead_s: float) -> None:
    """Each picture takes its share of calls of the best size: 4 prompts, 4 steps, 2 decodes."""
    table = replace(TABLE, overhead_s=overhead_s)
    assert table.capacity() == pytest.approx(1 / (overhead_s + 0.001 + 4 * 0.007 + 0.004))
    fleet = Fleet(engine=EngineConfig(max_live=1000))
    result = Simulation([table], fleet).run([0.0] * 400, Workload(steps=(4,)).requests())
    assert figures(result.recording)["request_throughput"] == pytest.approx(table.capacity(), rel=0.03)


def test_joining_answers_in_time_where_other_policies_do_not() -> None:
    rate = 1.5 * TABLE.capacity()
    ours, batches, fifo = (simulated(rate, Fleet(policy=policy)) for policy in ("joining", "whole-requests", "fifo"))
    assert goodput(ours) > 0.97
    assert goodput(fifo) <= goodput(batches) < 0.2
    assert set(figures(ours.recording)["steps_used"]) == {"1", "2", "4"}
    assert set(figures(fifo.recording)["steps_used"]) == {"4"}
    assert ours.late == 0


def test_slow_calls_make_a_lone_request_late_by_their_deviation() -> None:
    times = [r.e2el_s for r in simulated(1, seconds=200, table=replace(TABLE, deviation=0.1)).recording.records]
    pictures = [one for one in times if one > LONE_S / 2]
    assert 0.97 * LONE_S < sum(pictures) / len(pictures) < 1.1 * LONE_S
    assert max(pictures) > 1.05 * LONE_S > 0.95 * LONE_S > min(pictures)


def test_simulated_calls_take_the_measured_paces_in_their_order() -> None:
    """A request has six calls and the paces change after six, so any two requests in a row take the same time."""
    table = replace(TABLE, paces=(0.5,) * 6 + (1.5,) * 6)
    result = Simulation([table], Fleet()).run([5.0 * n for n in range(40)], Workload(steps=(4,)).requests())
    calls_s = [record.e2el_s - 0.005 for record in result.recording.records]
    pairs = [first + second for first, second in itertools.pairwise(calls_s)]
    assert pairs == pytest.approx([2 * (LONE_S - 0.005)] * len(pairs))
    assert max(calls_s) > 1.05 * min(calls_s)


@pytest.mark.parametrize("route", ["least-work", "two-choices", "round-robin"])
def test_more_replicas_do_more_work_and_a_failed_one_loses_no_request(route: str) -> None:
    rate = 2.5 * TABLE.capacity()
    fleet = Fleet(replicas=4, route=route, failures_per_hour=360, start_s=1)  # type: ignore[arg-type]
    result = simulated(rate, fleet, steps=4)
    assert len(result.recording.records) == len(arrivals_within(20, rate))
    assert (
        goodput(simulated(rate, steps=4))
        < 0.5
        < 0.7
        < goodput(result)
        < goodput(simulated(rate, replace(fleet, failures_per_hour=0), steps=4))
    )
    assert result.most_replicas == 4


def test_the_autoscaler_starts_replicas_under_load_and_stops_them_after_it() -> None:
    fleet = Fleet(most_replicas=8, start_s=2, idle_s=2)
    burst = arrivals_within(20, 4 * TABLE.capacity())
    calm = [20 + time_s for time_s in arrivals_within(100, 1)]
    requests = Workload(steps=(4,)).requests()
    result = Simulation([TABLE], fleet).run(burst + calm, requests)
    assert result.most_replicas >= 4
    always = result.most_replicas * 120
    assert result.replica_s < 0.6 * always


def test_two_models_share_the_replicas() -> None:
    other = replace(TABLE, name="other", step_counts=(1,))
    result = Simulation([TABLE, other], Fleet(), (3.0, 1.0)).run([float(n) for n in range(400)], Workload().requests())
    steps = figures(result.recording)["steps_used"]
    assert steps.keys() == {"1", "4"} and 0.6 < steps["4"] / 400 < 0.9


# -- command ---------------------------------------------------------------------------------------


def test_the_target_is_reached_by_the_fewest_replicas(tmp_path: Path) -> None:
    TABLE.write(tmp_path / "costs.json")
    assert read_table(str(tmp_path / "costs.json")) == TABLE
    given = [str(tmp_path / "costs.json"), "--request-rate", "100", "--duration-s", "5", "--usd-per-hour", "3.6"]
    found = {}
    for name, flags in (("fewest", ["--target", "0.95"]), ("fixed", ["--replicas", "1,2,3,4,5"])):
        assert main(["plan", *given, *flags, "--num-inference-steps", "4", "--result-filename", f"{tmp_path}/r"]) == 0
        found[name] = json.loads((tmp_path / "r").read_text())["runs"]
    (fewest,) = found["fewest"]
    shares = {run["replicas"]: run["goodput_share"] for run in found["fixed"]}
    assert fewest["replicas"] == min(replicas for replicas, share in shares.items() if share >= 0.95)
    assert fewest["usd_per_thousand"] == pytest.approx(
        fewest["replicas"] * 3.6 / 3600 * fewest["duration"] / fewest["completed"] * 1e3, rel=0.01
    )


def test_published_tables_can_be_planned_with(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    names = [file.stem for file in TABLES.glob("*.json")]
    assert len(names) >= 4
    assert main(["plan", *names, "--duration-s", "60", "--plot", str(tmp_path)]) == 0
    assert re.search(r"\| joining \| least-work \| 1 \| [\d.]+ \|", capsys.readouterr().out)
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_s": {}}, "text_s"),
        ({"text_s": {"2": 0.1}}, "each call needs the seconds of a batch of 1"),
        ({"text_s": {"1": float("nan")}}, "text_s"),
        ({"sizes": {"wide": {"denoise_s": {"1": 1}, "decode_s": {"1": 1}}}}, "'wide' is not WIDTHxHEIGHT"),
        ({"stpes": 1}, "stpes"),
    ],
)
def test_a_wrong_table_is_refused_with_its_field(
    change: dict[str, object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    TABLE.write(file := tmp_path / "costs.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(SystemExit, match="2"):
        main(["plan", str(file)])
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_an_unknown_table_names_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["plan", "z-image"])
    assert "z-image-turbo-h100" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num-inference-steps", "3"], "no pictures of 3 steps; it makes them of 1, 2, 4, 8"),
        (["--min-inference-steps", "9"], "no pictures of 9 steps"),
        (["--width", "64", "--height", "64"], "no costs of size 64x64; it has 1024x1024"),
        (["--shares", "0.5,0.5"], "2 values for 1 tables"),
        (["--route", "fastest"], "'fastest' is unknown"),
    ],
)
def test_a_flag_that_does_not_fit_the_table_is_refused(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["plan", "z-image-turbo-h100", *flags])
    assert message in capsys.readouterr().err


def test_a_trace_is_replayed_in_order_of_arrival(tmp_path: Path) -> None:
    (tmp_path / "trace").write_text(
        '{"arrival_s": 2, "num_inference_steps": 1}\n{"arrival_s": 1, "size": "64x64", "latency_budget_ms": 80}\n'
    )
    trace = read_trace(tmp_path / "trace", 500)
    first, second = trace.requests
    assert trace.arrivals == [1.0, 2.0]
    assert (first.size, first.latency_budget_ms, first.num_inference_steps) == ((64, 64), 80, "auto")
    assert (second.size, second.latency_budget_ms, second.num_inference_steps) == (None, 500, 1)


@pytest.mark.parametrize("line", ["{}", "[1]", '{"arrival_s": 1, "stpes": 2}', '{"arrival_s": 1, "size": "x"}', "no"])
def test_a_wrong_line_of_a_trace_is_refused_with_its_number(line: str, tmp_path: Path) -> None:
    (tmp_path / "trace").write_text(f'{{"arrival_s": 0}}\n{line}\n')
    with pytest.raises(ValueError, match="line 2 of the trace"):
        read_trace(tmp_path / "trace", 500)


def test_paces_are_multiples_of_the_mean_of_calls_of_one_kind_and_size() -> None:
    step, text = Kind("denoise"), Kind("text")
    calls = [(step, 1, 1.0), (step, 2, 5.0), (text, 1, 4.0), (step, 1, 3.0)]
    assert paces_of(calls) == [0.5, 1.0, 1.0, 1.5]


def test_a_profile_has_the_costs_that_the_engine_learned(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = load_model(tiny_checkpoint, BackendConfig("torch", threads=1, device="cpu"))
    recorded = RecordedCosts()
    with running_engine(model, costs=recorded) as engine:
        table = profile(engine, recorded, 0.6)
    (costs,) = list(table.sizes.values())[:1]
    assert len(table.paces) > 20
    assert table.step_counts == model.recipe.step_counts
    assert all(seconds > 0 for seconds in (costs.denoise_s[1], costs.decode_s[1], table.text_s[1], table.encode_s))
    table.write(tmp_path / "costs.json")
    assert read_table(str(tmp_path / "costs.json")) == table
