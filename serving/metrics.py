"""Prometheus metrics of one replica. No request ids or prompts as labels."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from serving.answers import ImageTimings
from tdm_runtime.engine import DiffusionEngine

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)


class ServerMetrics:
    """What /metrics tells."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter("tdm_requests", "Answers by HTTP status.", "status")
        self.rejected = self._counter("tdm_rejected", "Requests refused, by error code.", "reason")
        self.steps_used = self._counter("tdm_pictures", "Pictures made, by step count.", "num_inference_steps")
        self.jobs = self._counter(
            "tdm_jobs", "Jobs that a worker of this replica ended, by kind and how.", "kind", "status"
        )
        self.cancelled = self._counter("tdm_cancelled", "Requests whose client left.")
        self.not_finite = self._counter("tdm_nan", "Requests whose model output was NaN or infinite.")
        self.batch_size = Histogram(
            "tdm_batch_size", "Samples in a denoiser call.", registry=self.registry, buckets=BATCH_SIZES
        )
        self.step_seconds = self._seconds("tdm_step_seconds", "One denoiser call.")
        self.stages = {
            "queue_ms": self._seconds(
                "tdm_queue_seconds", "Waiting for the denoiser, before the first step and between steps."
            ),
            "text_ms": self._seconds("tdm_text_encode_seconds", "Prompt to embeddings."),
            "decode_ms": self._seconds("tdm_decode_seconds", "Latents to pixels."),
            "encode_ms": self._seconds("tdm_image_encode_seconds", "Pixels to a file."),
            "total_ms": self._seconds("tdm_e2e_seconds", "A whole request inside the server."),
        }
        self.denoise_seconds = self._seconds("tdm_denoise_seconds", "All denoiser steps of a picture.")

    def observe_batch(self, size: int, seconds: float) -> None:
        """One denoiser call."""
        self.batch_size.observe(size)
        self.step_seconds.observe(seconds)

    def observe_request(self, timings: ImageTimings) -> None:
        """One answered request."""
        for name, histogram in self.stages.items():
            histogram.observe(getattr(timings, name) / 1e3)
        self.denoise_seconds.observe(sum(timings.steps_ms) / 1e3)

    def watch(self, engine: DiffusionEngine) -> None:
        """Show the engine's own numbers, read when asked for."""
        text_encoder = engine.model.text_encoder
        self._gauge("tdm_live_samples", "Samples accepted and not yet answered.").set_function(lambda: engine.num_live)
        self._gauge("tdm_budgets_missed", "Latency budgets that were promised and not kept.").set_function(
            lambda: engine.num_late
        )
        self._gauge("tdm_result_cache_hits", "Pictures that had been made before.").set_function(
            lambda: engine.result_cache_hits
        )
        self._gauge("tdm_text_cache_hits", "Prompts found in the embedding cache.").set_function(
            lambda: text_encoder.cache_hits
        )
        self._gauge("tdm_text_cache_misses", "Prompts that had to be encoded.").set_function(
            lambda: text_encoder.cache_misses
        )

    def exposition(self) -> bytes:
        """Text in Prometheus' format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, registry=self.registry)

    def _seconds(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, registry=self.registry, buckets=SECONDS)
