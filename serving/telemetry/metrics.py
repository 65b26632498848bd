"""Prometheus metrics of one replica, in seconds and bytes. Labels have few values: never an id, a path or a prompt."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serving.schema.answers import ImageTimings
from tdm_runtime.engine.engine import DiffusionEngine
from tdm_runtime.model.loaded_model import LoadedModel

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "gRPC"})
OTHER = "other"
"""Label of unknown methods and of routes that are not served."""
ABOUT = ("model", "backend", "digest_short")
SHORT_DIGEST = 12
"""Number of characters of a digest in labels: enough to tell checkpoints apart on a graph."""


CALLS, HAND_OVER, ENCODING, FAILED = LATE_CAUSES = ("calls", "hand-over", "encoding", "failed")
"""Causes of a missed latency budget: what took the most beyond its share of it, or that the picture failed."""


class ServerMetrics:
    """Metrics that /metrics shows."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # they would double the series of each counter
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = self._counter("tdm_requests", "Answers of every route.", "method", "route", "status")
        self.rejected = self._counter("tdm_rejected", "Requests refused or failed, by error code.", "reason")
        self.steps_used = self._counter("tdm_pictures", "Pictures answered, by step count.", "num_inference_steps")
        self.jobs = self._counter("tdm_jobs", "Jobs that this process ended, by kind and status.", "kind", "status")
        self.cancelled = self._counter("tdm_cancelled", "Requests whose client left.")
        self.retried = self._counter("tdm_retried", "Requests sent to another engine because theirs died.")
        self.not_finite = self._counter("tdm_nan", "Requests whose model output was NaN or infinite.")
        self.budgets_promised = self._counter("tdm_budgets_promised", "Requests accepted with a latency budget.")
        self.budgets_kept = self._counter("tdm_budgets_kept", "Requests answered within their latency budget.")
        self.budgets_missed = self._counter(
            "tdm_budgets_missed", "Requests with a budget that came late or failed, by cause.", "cause"
        )
        for cause in LATE_CAUSES:  # the series exist before the first miss
            self.budgets_missed.labels(cause)
        self.batch_size = Histogram(
            "tdm_batch_size", "Samples in a denoiser call.", registry=self.registry, buckets=BATCH_SIZES
        )
        self.step_seconds = self._seconds("tdm_step_seconds", "One denoiser call.")
        self.stages = {
            "queue_ms": self._seconds(
                "tdm_queue_seconds", "Waiting for the denoiser, before the first step and between steps."
            ),
            "text_ms": self._seconds("tdm_text_encode_seconds", "Prompt to embeddings."),
            "image_ms": self._seconds("tdm_given_picture_encode_seconds", "Given picture of an edit to latents."),
            "decode_ms": self._seconds("tdm_decode_seconds", "Latents to pixels."),
            "encode_ms": self._seconds("tdm_image_encode_seconds", "Pixels to a file."),
            "total_ms": self._seconds("tdm_e2e_seconds", "A whole request inside the server."),
        }
        self.denoise_seconds = self._seconds("tdm_denoise_seconds", "All denoiser steps of a picture.")

    def observe_batch(self, size: int, seconds: float) -> None:
        """Count one denoiser call."""
        self.batch_size.observe(size)
        self.step_seconds.observe(seconds)

    def observe_request(self, timings: ImageTimings, budget_kept: bool | None, late_by: str | None) -> None:
        """Count one answered request.

        Args:
            budget_kept: None if it had no latency budget.
            late_by: what made it late, see `ImageAnswer.late_by`.
        """
        for name, histogram in self.stages.items():
            if name != "image_ms" or timings.image_ms:
                histogram.observe(getattr(timings, name) / 1e3)
        self.denoise_seconds.observe(sum(timings.steps_ms) / 1e3)
        if budget_kept is None:
            return
        self.budgets_promised.inc()
        if late_by is None:
            self.budgets_kept.inc()
        else:
            self.budgets_missed.labels(late_by).inc()

    def observe_unanswered(self, *, has_failed: bool) -> None:
        """Count a request with a latency budget that was accepted, and failed or lost its client."""
        self.budgets_promised.inc()
        if has_failed:
            self.budgets_missed.labels(FAILED).inc()

    def observe_answer(self, method: str, route: str, status: int | str) -> None:
        """Count one request of any front, answered or not.

        Args:
            route: template of the path, never the requested path.
            status: HTTP status, or name of the gRPC status.
        """
        self.requests.labels(method if method in METHODS else OTHER, route, status).inc()

    def watch_engine(self, engine: DiffusionEngine, models: Callable[[], Sequence[LoadedModel]]) -> None:
        """Show the engine's own numbers. They are read at each scrape."""
        self.registry.register(EngineNumbers(engine, models))

    def watch_live(self, num_live: Callable[[], int], most: int) -> None:
        """Show the number of unanswered pictures and its limit."""
        self._gauge("tdm_live_samples", "Samples accepted and not yet answered.").set_function(num_live)
        self._gauge("tdm_live_samples_limit", "Most samples at once; more requests are refused.").set(most)

    def watch_requests(self, num_open: Callable[[], int], most: int) -> None:
        """Show the number of open requests and its limit."""
        self._gauge("tdm_open_requests", "Requests not yet answered, including this scrape.").set_function(num_open)
        self._gauge("tdm_open_requests_limit", "Most requests at once; more are refused.").set(most)

    def exposition(self) -> bytes:
        """Return all metrics in the text format of Prometheus."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, registry=self.registry)

    def _seconds(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, registry=self.registry, buckets=SECONDS)


class EngineNumbers(Collector):
    """Numbers that the engine keeps for itself. They are read only at a scrape."""

    def __init__(self, engine: DiffusionEngine, models: Callable[[], Sequence[LoadedModel]]) -> None:
        self._engine = engine
        self._models = models

    def collect(self) -> Iterable[Metric]:
        """Yield the metrics. prometheus_client calls it at each scrape."""
        engine, models = self._engine, self._models()
        text_encoders = {model.text_encoder for model in models}
        about = GaugeMetricFamily("tdm_model_info", "Always 1; the labels name a served model.", labels=ABOUT)
        for model in models:
            about.add_metric([model.name, model.backend, model.digest[:SHORT_DIGEST]], 1)
        yield about
        yield GaugeMetricFamily("tdm_threads", "Threads of the process, including those of libraries.", _num_threads())
        for name, text, value in (
            ("tdm_oom", "Calls to the model that did not fit into memory.", engine.stats.out_of_memory),
            ("tdm_text_cache_hits", "Prompts found in the embedding cache.", sum(t.cache_hits for t in text_encoders)),
            ("tdm_text_cache_misses", "Prompts that had to be encoded.", sum(t.cache_misses for t in text_encoders)),
            ("tdm_result_cache_hits", "Pictures found in the result cache.", engine.result_cache_hits),
        ):
            yield CounterMetricFamily(name, text, value)


def _num_threads() -> int:
    try:
        return len(os.listdir("/proc/self/task"))
    except OSError:  # not Linux, and there ProcessCollector has no values either
        return 0
