"""Every query of the dashboard uses existing metrics, checked with a real PromQL parser and a real /metrics."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.serving.conftest import RunningServer

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana/dashboard.json").read_text())
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
TARGET_LABELS = {"instance", "job"}
"""Labels that Prometheus adds to every series."""

Series = dict[str, set[str]]
"""Sample name -> its labels."""


@pytest.fixture(scope="module")
def series(tdm_server: RunningServer) -> Series:
    """Series of a server that made pictures with and without a latency budget and refused one request."""
    for extra in ({}, {"latency_budget_ms": 60_000}, {"size": "9x9"}):
        httpx.post(f"{tdm_server.url}/v1/images/generations", json={"prompt": "a cat", **extra}, timeout=60)
    text = httpx.get(f"{tdm_server.url}/metrics").text
    found: Series = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def parsed(query: str) -> Any:
    return promql_parser.parse(re.sub(r"\$__rate_interval", "1m", query))


def nodes(node: Any) -> Iterator[Any]:
    """Yield an expression and everything within it."""
    yield node
    for name in ("expr", "lhs", "rhs", "vector_selector", "args", "param"):
        inner = getattr(node, name, None)
        for child in inner if isinstance(inner, list) else [inner]:
            if isinstance(child, promql_parser.Expr):
                yield from nodes(child)


def selectors(node: Any) -> list[Any]:
    return [each for each in nodes(node) if isinstance(each, promql_parser.VectorSelector)]


@pytest.mark.parametrize("query", QUERIES)
def test_a_query_uses_existing_series_and_labels(query: str, series: Series) -> None:
    asked = selectors(parsed(query))
    assert asked
    for selector in asked:
        assert selector.name in series, f"the server has no series {selector.name}"
        wanted = {matcher.name for matcher in selector.matchers.matchers}
        assert wanted <= series[selector.name] | TARGET_LABELS
    labels = set().union(*(series[selector.name] for selector in asked)) | TARGET_LABELS
    for grouped in re.findall(r"\b(?:by|on) \(([^)]*)\)", query):
        assert {label.strip() for label in grouped.split(",")} <= labels


@pytest.mark.parametrize("panel", DASHBOARD["panels"], ids=lambda panel: panel["title"])
def test_the_legend_of_a_panel_uses_labels_of_its_query(panel: dict[str, Any], series: Series) -> None:
    for target in panel["targets"]:
        labels = set().union(*(series[selector.name] for selector in selectors(parsed(target["expr"]))))
        assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= labels | TARGET_LABELS


def test_selectors_finds_every_metric_of_a_query() -> None:
    query = 'sum(rate(a_total{x="1"}[1m])) / (sum by (le) (b) + histogram_quantile(0.5, c)) and on (d) e'
    assert {selector.name for selector in selectors(parsed(query))} == {"a_total", "b", "c", "e"}


def test_grafana_can_provision_the_dashboard() -> None:
    assert DASHBOARD["schemaVersion"] >= 39
    assert [variable["type"] for variable in DASHBOARD["templating"]["list"]] == ["datasource"]
    for panel in DASHBOARD["panels"]:
        assert panel["title"] and panel["description"]
        assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${datasource}"}
    for file in DEPLOY.rglob("*.y*ml"):
        assert yaml.safe_load(file.read_text())


def test_prometheus_scrapes_the_metrics_route_of_the_server() -> None:
    (job,) = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())["scrape_configs"]
    assert job["metrics_path"] == "/metrics"
