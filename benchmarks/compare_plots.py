"""The plots of `tdm-bench compare`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import plots
from benchmarks.compare_tables import PEER_KINDS, Results, best_peer
from benchmarks.contenders import ENGINE, OURS
from benchmarks.phases import SCENARIOS, STEPS


def draw(results: Results, folder: Path) -> None:
    """Write the plots of the measured phases."""
    measured = {name: found for name, found in results.get("contenders", {}).items() if "throughput" in found}
    shown = {name: measured[name] for name in _shown(measured)}
    if shown:
        latencies = {
            name: [1e3 * e2el_s for e2el_s in found["unloaded"]["e2els"] if e2el_s is not None]
            for name, found in shown.items()
        }
        plots.plot_latency_cdf(folder / "latency.png", latencies, title=f"One request at a time, K = {STEPS}")
        plots.plot_throughput_latency(folder / "throughput.png", {n: _sweep(found) for n, found in shown.items()})
    for number, (kind, pair) in enumerate(results.get("slo", {}).items()):
        if isinstance(pair, dict) and "peer" in pair:
            title = f"Against the best peer with {kind}, Poisson arrivals"
            plots.plot_goodput(folder / f"goodput-{number}.png", _shares(pair), pair["slo_ms"], title)
    if points := results.get("quality", {}).get("points"):
        plots.plot_quality_latency(folder / "quality.png", [plots.Quality(**point) for point in points])


def _shown(measured: Mapping[str, Any]) -> list[str]:
    """Return the contenders of the plots: ours, every peer with our backend, the best peer with each other one."""
    names = [name for name in (OURS, ENGINE) if name in measured]
    names += [name for name, found in measured.items() if found.get("given") == "ours"]
    others = [best_peer(measured, *backends) for backends in PEER_KINDS.values() if backends != ("ours",)]
    return names + [name for name in others if name is not None]


def _sweep(found: Mapping[str, Any]) -> list[plots.Load]:
    alone = found["unloaded"]
    loads = [plots.Load(1, alone["request_throughput"], alone["median_e2el_ms"])]
    return loads + [
        plots.Load(int(concurrency), load["request_throughput"], load["median_e2el_ms"])
        for concurrency, load in found["loads"].items()
        if load["completed"]
    ]


def _shares(pair: Mapping[str, Any]) -> dict[str, dict[float, float]]:
    """Return label -> rate -> share within the SLO, for the Poisson scenarios."""
    runs: Sequence[tuple[str, str]] = (
        ("auto", f"{OURS}, auto"),
        ("fixed", f"{OURS}, K = {STEPS}"),
        ("peer", f"{pair['name']}, K = {STEPS}"),
    )
    return {
        label: {
            scenario.load * pair["capacity"]: found["goodput_share"]
            for scenario, found in zip(SCENARIOS, pair[key], strict=True)
            if scenario.burstiness == 1
        }
        for key, label in runs
    }
