"""Tables of the comparison in Markdown, with a note for everything that could not be measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.contenders import ENGINE, OURS
from benchmarks.phases import JOINING_LOAD, SCENARIOS, SLO_FACTOR, STEPS
from benchmarks.report import Figures, cell, markdown_table

BEGIN = "<!-- tdm-bench compare: begin -->"
END = "<!-- tdm-bench compare: end -->"

PEER_KINDS = {
    "the stock pipeline": ("stock-fp32", "stock-bf16"),
    "OpenVINO GenAI": ("openvino-genai",),
    "our backend": ("ours",),
}
"""Kinds of peers. Against "our backend" only the server differs; against the others the backend does too."""

Results = dict[str, Any]
"""Phase -> its result, or {"error": message} if it failed."""


def to_markdown(results: Results) -> str:
    """Return the tables of every measured phase, in order."""
    parts = [_machine(results)]
    for phase, tables in (
        ("contenders", _contenders),
        ("slo", _slo),
        ("joining", _joining),
        ("isolation", _isolation),
        ("overhead", _overhead),
        ("quality", _quality),
    ):
        if (found := results.get(phase)) is None:
            continue
        failed = found.get("error")
        parts += [f"**{phase}** failed: {failed}."] if failed else tables(found)
    return "\n\n".join(parts) + "\n"


def write_between_markers(file: Path, text: str) -> None:
    """Replace the text between the two marker lines.

    Raises:
        ValueError: the file lacks them.
    """
    check_markers(file)
    before, _, rest = file.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    file.write_text(f"{before}{BEGIN}\n{text}{END}{after}", encoding="utf-8")


def check_markers(file: Path) -> None:
    """Check that a file has both marker lines, before anything is measured.

    Raises:
        ValueError: the file lacks them.
    """
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    if not 0 <= text.find(BEGIN) < text.find(END):
        raise ValueError(f"{file} lacks the lines {BEGIN} and {END}; add both lines where the tables should go")


def best_peer(contenders: Mapping[str, Any], *backends: str) -> str | None:
    """Return the measured peer with the highest throughput among those with one of `backends`, or None."""
    peers = [name for name, found in contenders.items() if found.get("given") in backends and "throughput" in found]
    return max(peers, key=lambda name: float(contenders[name]["throughput"]), default=None)


def _machine(results: Results) -> str:
    """Return the lines that name the machine and warn about unreliable figures."""
    measured: Mapping[str, list[dict[str, Any]]] = results["measured"]
    machines: dict[str, list[str]] = {}
    for phase, conditions in measured.items():
        for found in conditions:
            machines.setdefault(found["machine"], []).append(phase)
    lines = [f"`tdm-bench compare` on {machine} ({', '.join(phases)})." for machine, phases in machines.items()]
    for flag, remark in (
        ("is_quick", "shortened by `--quick`; the figures mean nothing"),
        ("is_busy", "measured while the machine was busy with other work"),
    ):
        if concerned := [phase for phase, conditions in measured.items() if any(c[flag] for c in conditions)]:
            lines.append(f"{', '.join(concerned)}: {remark}.")
    return "\n".join(lines)


# -- contenders -------------------------------------------------------------------------------


def _contenders(contenders: Mapping[str, Any]) -> Iterator[str]:
    measured = {name: found for name, found in contenders.items() if "throughput" in found}
    ordered = sorted(measured.items(), key=lambda item: -float(item[1]["throughput"]))
    rows = [
        [
            name,
            found["served"].get("backend") or found.get("given", "-"),
            cell(found["unloaded_ms"]),
            cell(found["throughput"]),
            str(found["best_concurrency"]),
            cell(found["loads"][str(found["best_concurrency"])]["median_e2el_ms"]),
        ]
        for name, found in ordered
    ]
    header = [
        f"K = {STEPS}",
        "backend",
        "one at a time, ms, p50",
        "highest throughput, pictures/s",
        "requests in flight",
        "ms, p50",
    ]
    yield markdown_table(header, rows)
    missing = [f"- {name}: not run: {found['not_run']}" for name, found in contenders.items() if "not_run" in found]
    if missing:
        yield "\n".join(missing)
    yield from _ratios(contenders)


def _ratios(contenders: Mapping[str, Any]) -> Iterator[str]:
    rows = []
    for ours in (OURS, ENGINE):
        for kind, backends in PEER_KINDS.items():
            peer = best_peer(contenders, *backends)
            if peer is not None and "throughput" in contenders.get(ours, {}):
                ratio = float(contenders[ours]["throughput"]) / float(contenders[peer]["throughput"])
                rows.append([f"{ours} / best peer with {kind} ({peer})", cell(ratio, 2)])
    if rows:
        yield markdown_table(["throughput", "ratio"], rows)


# -- within an SLO ----------------------------------------------------------------------------


def _slo(pairs: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"Share of all requests answered within the SLO. The SLO is {SLO_FACTOR:g} times the peer's own unloaded "
        f"latency at {STEPS} steps, and both servers get the same schedule. Latency counts from the scheduled arrival; "
        'rejected and failed requests count as late. "auto" lets the server choose the steps within the latency budget.'
    )
    for kind, pair in pairs.items():
        if "not_run" in pair:
            yield f"Against the best peer with {kind}: not run: {pair['not_run']}."
            continue
        rows = []
        for scenario, peer, auto, fixed in zip(SCENARIOS, pair["peer"], pair["auto"], pair["fixed"], strict=True):
            arrivals = "Poisson" if scenario.burstiness == 1 else f"burstiness {scenario.burstiness:g}"
            rows.append(
                [
                    f"{100 * scenario.load:.0f} %, {arrivals}",
                    _share(peer),
                    _share(auto),
                    cell(auto["mean_steps_used"], 2),
                    _share(fixed),
                    _over(auto, peer),
                    _over(fixed, peer),
                ]
            )
        header = [
            f"SLO {pair['slo_ms']:.0f} ms, 100 % = {pair['capacity']:.1f}/s",
            f"{pair['name']}, K = {STEPS}",
            f"{OURS}, auto",
            "mean K",
            f"{OURS}, K = {STEPS}",
            "auto / peer",
            f"K = {STEPS} / peer",
        ]
        yield f"Against the best peer with {kind}:\n\n{markdown_table(header, rows)}"


def _share(found: Figures) -> str:
    if not found["completed"] and found["errors"]:
        return f"none ({max(found['errors'], key=found['errors'].get)})"
    return cell(found["goodput_share"], 3)


def _over(ours: Figures, peer: Figures) -> str:
    if not peer["goodput_share"]:
        return "peer: none" if ours["goodput_share"] else "-"
    return cell(ours["goodput_share"] / peer["goodput_share"], 2)


# -- the engine in this process ---------------------------------------------------------------


def _joining(found: Mapping[str, Any]) -> Iterator[str]:
    whole, joined = found["whole"], found["joining"]
    rows = [
        [name, *(cell(run[f"{p}_e2el_ms"]) for p in ("median", "p90", "p99")), cell(run["mean_batch_size"], 2)]
        for name, run in (("batching whole requests", whole), ("joining between steps", joined))
    ]
    arrivals = f"K = 1..{STEPS} mixed, {found['rate']:.1f}/s ({100 * JOINING_LOAD:.0f} % of whole-request batching)"
    yield markdown_table([arrivals, "ms, p50", "p90", "p99", "samples per call"], rows)
    if joined["median_e2el_ms"] and whole["median_e2el_ms"]:
        ratio = whole["median_e2el_ms"] / joined["median_e2el_ms"]
        yield f"Median latency, whole requests / joining: {ratio:.2f}."


def _isolation(found: Mapping[str, Any]) -> Iterator[str]:
    rows = [
        [name, *(cell(run[f"{p}_e2el_ms"]) for p in ("median", "p90", "p99"))] for name, run in found["runs"].items()
    ]
    width, height = found["large"]
    among = f"one in {found['small_to_large']} is {width}x{height}; {found['rate']:.1f}/s"
    yield markdown_table([f"small pictures, K = {STEPS}; {among}", "ms, p50", "p90", "p99"], rows)


def _overhead(found: Mapping[str, Any]) -> Iterator[str]:
    rows = [["submission to pixels", cell(found["wall_ms"], 2)]]
    rows += [[part, cell(ms, 3)] for part, ms in found["parts_ms"].items()]
    rows += [
        ["everything except model calls", cell(found["engine_ms"], 3)],
        ["text cache hit", cell(found["text_cache_hit_ms"], 4)],
        ["PNG", cell(found["png_ms"], 3)],
    ]
    yield markdown_table([f"engine in process, K = {found['steps']}, one at a time", "ms, p50"], rows)
    yield (
        f"The engine's own share of the time to pixels is {100 * found['engine_share']:.1f} %; "
        f"PNG encoding takes {100 * found['png_share']:.1f} % of a request."
    )


def _quality(found: Mapping[str, Any]) -> Iterator[str]:
    rows = [
        [str(point["num_inference_steps"]), cell(point["median_ms"]), cell(point["psnr_db"])]
        for point in found["points"]
    ]
    yield markdown_table(["K", "ms, p50, in process", f"dB against K = {STEPS}"], rows)
    yield (
        f"dB: PSNR against the picture of {STEPS} steps with the same seed, mean of {found['pictures']} pictures. "
        "It shows how much the later steps still change, not which picture is better."
    )
