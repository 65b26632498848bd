"""Metrics of a running server."""

from __future__ import annotations

import time
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

Sample = tuple[str, frozenset[tuple[str, str]]]


def scrape(http: httpx.Client) -> dict[Sample, float]:
    """Return the value of each sample."""
    text = http.get("/metrics").text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {(sample.name, frozenset(sample.labels.items())): sample.value for sample in samples}


def increase(before: dict[Sample, float], after: dict[Sample, float], name: str, **labels: str) -> float:
    sample = (name, frozenset(labels.items()))
    return after.get(sample, 0.0) - before.get(sample, 0.0)


def ask(http: httpx.Client, **extra: Any) -> int:
    return http.post("/v1/images/generations", json={"prompt": "a cat", **extra}).status_code


def test_latency_budgets_are_counted_as_promised_and_as_kept_or_missed(http: httpx.Client) -> None:
    before = scrape(http)
    assert [ask(http, latency_budget_ms=60_000), ask(http), ask(http, latency_budget_ms=0.01)] == [200, 200, 400]
    after = scrape(http)
    kept, missed = (increase(before, after, f"tdm_budgets_{what}_total") for what in ("kept", "missed"))
    assert increase(before, after, "tdm_budgets_promised_total") == kept + missed == 1
    assert increase(before, after, "tdm_rejected_total", reason="latency_budget_too_small") == 1
    assert increase(before, after, "tdm_e2e_seconds_count") == 2


@pytest.mark.parametrize(
    ("method", "path", "route", "status"),
    [
        ("GET", "/v1/models/tdm-emoji", "/v1/models/{model_id}", 200),
        ("GET", "/v1/models/another", "/v1/models/{model_id}", 404),
        ("PUT", "/v1/models", "/v1/models", 405),
        ("GET", "/playground/static/playground.js", "/playground/static/{path}", 200),
        ("GET", "/nowhere/else", "other", 404),
        ("GET", "/", "/", 200),
    ],
)
def test_a_request_is_counted_under_the_template_of_its_route(
    http: httpx.Client, method: str, path: str, route: str, status: int
) -> None:
    before = scrape(http)
    assert http.request(method, path).status_code == status
    deadline_s = time.monotonic() + 10
    labels = {"method": method, "route": route, "status": str(status)}
    while not (found := increase(before, scrape(http), "tdm_requests_total", **labels)):
        assert time.monotonic() < deadline_s
        time.sleep(0.01)  # the server counts a request shortly after the client has the answer
    assert found == 1


def test_metrics_have_the_process_of_the_replica_and_the_limits(http: httpx.Client) -> None:
    now = {name: value for (name, labels), value in scrape(http).items() if not labels}
    assert now["process_resident_memory_bytes"] > 2**27
    assert now["process_open_fds"] > 10 and now["tdm_threads"] > 3
    assert now["tdm_live_samples_limit"] == 32
    assert now["tdm_open_requests"] == 1 <= now["tdm_open_requests_limit"]
