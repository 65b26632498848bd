"""Metric names and labels are a public API: users' dashboards and alerts depend on them."""

from __future__ import annotations

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from serving.schema.answers import ImageTimings
from serving.telemetry.metrics import METHODS, OTHER, SECONDS, ServerMetrics
from tdm_runtime.engine.engine import DiffusionEngine
from tdm_runtime.model.loaded_model import LoadedModel

METRICS = {
    "tdm_batch_size": ("histogram", set()),
    "tdm_budgets_kept": ("counter", set()),
    "tdm_budgets_missed": ("counter", {"cause"}),
    "tdm_budgets_promised": ("counter", set()),
    "tdm_cancelled": ("counter", set()),
    "tdm_decode_seconds": ("histogram", set()),
    "tdm_denoise_seconds": ("histogram", set()),
    "tdm_e2e_seconds": ("histogram", set()),
    "tdm_image_encode_seconds": ("histogram", set()),
    "tdm_jobs": ("counter", {"kind", "status"}),
    "tdm_live_samples": ("gauge", set()),
    "tdm_live_samples_limit": ("gauge", set()),
    "tdm_model_info": ("gauge", {"backend", "digest_short", "model"}),
    "tdm_nan": ("counter", set()),
    "tdm_oom": ("counter", set()),
    "tdm_open_requests": ("gauge", set()),
    "tdm_open_requests_limit": ("gauge", set()),
    "tdm_pictures": ("counter", {"num_inference_steps"}),
    "tdm_queue_seconds": ("histogram", set()),
    "tdm_rejected": ("counter", {"reason"}),
    "tdm_requests": ("counter", {"method", "route", "status"}),
    "tdm_result_cache_hits": ("counter", set()),
    "tdm_retried": ("counter", set()),
    "tdm_step_seconds": ("histogram", set()),
    "tdm_text_cache_hits": ("counter", set()),
    "tdm_text_cache_misses": ("counter", set()),
    "tdm_text_encode_seconds": ("histogram", set()),
    "tdm_given_picture_encode_seconds": ("histogram", set()),
    "tdm_threads": ("gauge", set()),
}
"""Name -> type and labels. The samples of a counter end with `_total`."""
PROCESS_METRICS = {
    "process_cpu_seconds",
    "process_max_fds",
    "process_open_fds",
    "process_resident_memory_bytes",
    "process_start_time_seconds",
    "process_virtual_memory_bytes",
}
TIMINGS = ImageTimings(queue_ms=1, text_ms=1, steps_ms=[3, 3], decode_ms=2, encode_ms=1, total_ms=11)


def used_metrics(model: LoadedModel) -> ServerMetrics:
    """Return metrics in which every label was observed once."""
    metrics = ServerMetrics()
    metrics.watch_engine(DiffusionEngine(model), lambda: [model])
    metrics.watch_live(lambda: 1, 2)
    metrics.watch_requests(lambda: 1, 2)
    metrics.observe_request(TIMINGS, True, None)
    metrics.observe_request(TIMINGS, False, "calls")
    metrics.observe_unanswered(has_failed=True)
    metrics.observe_answer("POST", "/v1/images/generations", 200)
    metrics.rejected.labels("queue_full").inc()
    metrics.steps_used.labels(2).inc()
    metrics.jobs.labels("video", "completed").inc()
    return metrics


def families(metrics: ServerMetrics) -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(metrics.exposition().decode())}


def test_the_server_exposes_exactly_these_metrics(model: LoadedModel) -> None:
    exposed = families(used_metrics(model))
    labels = {name: set().union(*(sample.labels for sample in family.samples)) for name, family in exposed.items()}
    found = {name: (family.type, labels[name] - {"le"}) for name, family in exposed.items() if name.startswith("tdm_")}
    assert found == METRICS
    assert {name for name in exposed if not name.startswith("tdm_")} == PROCESS_METRICS


def test_histograms_of_durations_reach_from_a_millisecond_to_ten_minutes(model: LoadedModel) -> None:
    assert (SECONDS[0], SECONDS[-1]) == (0.001, 600)
    for name, family in families(used_metrics(model)).items():
        bounds = [float(sample.labels["le"]) for sample in family.samples if "le" in sample.labels]
        assert name.endswith("_seconds") is (bounds == [*SECONDS, float("inf")]) or name.startswith("process_")


def test_an_unknown_http_method_never_becomes_a_label() -> None:
    metrics = ServerMetrics()
    for method in (*METHODS, "BREW", "X" * 1000):
        metrics.observe_answer(method, "/health", 200)
    methods = {sample.labels["method"] for sample in families(metrics)["tdm_requests"].samples}
    assert methods == METHODS | {OTHER}
