"""The engine's counters as custom metrics of Triton, on its /metrics."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import triton_python_backend_utils as pb_utils

from tdm_runtime import DiffusionEngine

COUNTERS = {
    "tdm_denoiser_calls_total": ("steps", "Denoiser calls"),
    "tdm_sample_steps_total": ("sample_steps", "Samples in those calls, summed"),
    "tdm_finished_total": ("finished", "Pictures made"),
    "tdm_failed_total": ("failed", "Pictures that failed"),
    "tdm_cancelled_total": ("cancelled", "Pictures cancelled by their clients"),
    "tdm_refused_total": ("refused", "Pictures refused: queue full, or latency budget out of reach"),
}
"""Metric -> the field of `EngineStats` and what it counts."""
LIVE = "tdm_live"


class EngineMetrics:
    """Metrics of one engine. They do nothing on a server that was started without metrics."""

    def __init__(self, engine: DiffusionEngine, labels: Mapping[str, str]) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        """Metrics that two threads touch at once crash the server."""
        family = pb_utils.MetricFamily
        wanted = [(LIVE, "Pictures accepted and not yet answered", family.GAUGE)]
        wanted += [(name, help, family.COUNTER) for name, (_, help) in COUNTERS.items()]
        try:
            self._families = {name: family(name=name, description=help, kind=kind) for name, help, kind in wanted}
        except pb_utils.TritonModelException as error:
            pb_utils.Logger.log_warn(f"no metrics of the engine: {error}")
            self._families = {}
        self._metrics = {name: found.Metric(labels=dict(labels)) for name, found in self._families.items()}
        self._shown = dict.fromkeys(self._metrics, 0)
        """Their values. Asking Triton for them, or setting what has not changed, costs a message to the server."""

    def update(self) -> None:
        """Bring the metrics up to date.

        The number of live pictures is read last and shown first, so that none is ever shown as live and as finished.
        """
        with self._lock:
            values = {name: getattr(self._engine.stats, field) for name, (field, _) in COUNTERS.items()}
            values[LIVE] = self._engine.num_live
            for name, metric in self._metrics.items():
                if change := values[name] - self._shown[name]:
                    metric.increment(change)
                    self._shown[name] = values[name]
