"""Spans of requests and of their stages, in memory and at a collector."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from serving.config import ServerConfig
from serving.schema.answers import ImageTimings
from serving.telemetry.tracing import Tracing, current_span, request_span

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
HEADERS = {"traceparent": f"00-{TRACE_ID}-b7ad6b7169203331-01", "tracestate": "vendor=1"}
TIMINGS = ImageTimings(queue_ms=9.0, text_ms=2.0, steps_ms=[3.0, 4.0], decode_ms=5.0, encode_ms=2.0, total_ms=26.0)
"""The total has another millisecond, of handing over."""
WAITS_MS = [1.0, 0.0, 6.0, 2.0]
OFF = """
import sys
from serving.web.app import build_app
from serving.fronts.services import Services
from serving.config import ServerConfig
from serving.telemetry.tracing import Tracing, current_span, request_span
with request_span(Tracing.start(ServerConfig()), {}, "POST") as span:
    assert span is None and current_span() is None
assert not [name for name in sys.modules if name.startswith(("opentelemetry.sdk", "opentelemetry.exporter"))]
"""


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracing(exporter: InMemorySpanExporter) -> Tracing:
    return Tracing([exporter])


def spans(tracing: Tracing, exporter: InMemorySpanExporter) -> list[ReadableSpan]:
    tracing.close()
    return sorted(exporter.get_finished_spans(), key=lambda span: span.start_time or 0)


def test_the_sdk_is_not_imported_while_tracing_is_off() -> None:
    subprocess.run([sys.executable, "-c", OFF], check=True)


def test_stages_have_their_times_and_gaps_are_waits(tracing: Tracing, exporter: InMemorySpanExporter) -> None:
    with request_span(tracing, {}, "POST") as span:
        assert span is not None
        span.record_stages(TIMINGS, WAITS_MS, TIMINGS.total_ms)
    *stages, _ = sorted(spans(tracing, exporter), key=lambda span: span.kind == SpanKind.SERVER)
    start_ns = stages[0].start_time or 0
    found = [(s.name, ((s.start_time or 0) - start_ns) / 1e6, ((s.end_time or 0) - start_ns) / 1e6) for s in stages]
    assert [name for name, _, _ in found] == ["queue", "text", "denoise", "denoise", "decode", "encode"]
    expected = [(0, 1), (1, 3), (3, 6), (12, 16), (18, 23), (TIMINGS.total_ms - 2, TIMINGS.total_ms)]
    assert [times for _, *times in found] == [pytest.approx(times, abs=0.01) for times in expected]
    assert [s.attributes for s in stages if s.name == "denoise"] == [{"tdm.step": 1}, {"tdm.step": 2}]


def test_a_picture_from_the_cache_has_only_the_encode_stage(tracing: Tracing, exporter: InMemorySpanExporter) -> None:
    with request_span(tracing, {}, "POST") as span:
        assert span is not None
        span.record_stages(replace(TIMINGS, total_ms=3.0), [], 3.0)
    assert {span.name for span in spans(tracing, exporter)} == {"POST", "encode"}


def test_a_request_continues_the_trace_of_its_caller(tracing: Tracing, exporter: InMemorySpanExporter) -> None:
    with request_span(tracing, HEADERS, "POST") as span:
        assert span is not None
        assert span.trace_id == TRACE_ID
        assert span.traceparent.startswith(f"00-{TRACE_ID}-") and span.traceparent.endswith("-01")
    (made,) = spans(tracing, exporter)
    assert made.parent is not None and f"{made.parent.span_id:016x}" == "b7ad6b7169203331"
    assert made.context is not None and made.context.trace_state.get("vendor") == "1"


@pytest.mark.parametrize("traceparent", ["", "nonsense", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "ff-" + "x" * 9999])
def test_a_broken_traceparent_begins_a_trace_of_its_own(
    tracing: Tracing, exporter: InMemorySpanExporter, traceparent: str
) -> None:
    with request_span(tracing, {"traceparent": traceparent}, "POST"):
        pass
    assert [span.parent for span in spans(tracing, exporter)] == [None]


def test_a_caller_can_turn_sampling_off(tracing: Tracing, exporter: InMemorySpanExporter) -> None:
    with request_span(tracing, {"traceparent": f"00-{TRACE_ID}-b7ad6b7169203331-00"}, "POST") as span:
        assert span is not None
        span.record_stages(TIMINGS, WAITS_MS, 20.0)
    assert spans(tracing, exporter) == []


@pytest.mark.parametrize(("status", "is_ours"), [(400, False), (429, False), (499, False), (500, True), (504, True)])
def test_a_failed_span_has_its_code_and_is_an_error_only_from_status_500_on(
    tracing: Tracing, exporter: InMemorySpanExporter, status: int, is_ours: bool
) -> None:
    with request_span(tracing, {}, "POST") as span:
        assert span is not None
        span.fail("the_code", status)
    (made,) = spans(tracing, exporter)
    assert made.attributes == {"error.type": "the_code"}
    assert (made.status.status_code is StatusCode.ERROR) is is_ours


def test_concurrent_requests_have_their_own_spans(tracing: Tracing) -> None:
    async def one() -> bool:
        with request_span(tracing, {}, "POST") as span:
            await asyncio.sleep(0.001)
            return current_span() is span

    async def several() -> list[bool]:
        return await asyncio.gather(*(one() for _ in range(10)))

    assert all(asyncio.run(several()))
    assert current_span() is None


class Collector(ThreadingHTTPServer):
    """Receives traces with OTLP over HTTP."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Receiver)
        self.received: list[tuple[str, ExportTraceServiceRequest]] = []


class Receiver(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        assert isinstance(self.server, Collector)
        self.server.received.append((self.path, ExportTraceServiceRequest.FromString(body)))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


def test_a_collector_receives_the_spans(collector: Collector) -> None:
    tracing = Tracing.start(ServerConfig(otlp_endpoint=f"http://127.0.0.1:{collector.server_port}/"))
    with request_span(tracing, HEADERS, "POST /v1/images/generations") as span:
        assert span is not None
        span.set({"tdm.n": 3})
        span.record_stages(TIMINGS, WAITS_MS, 20.0)
    assert tracing is not None
    tracing.close()
    ((path, sent),) = collector.received
    assert path == "/v1/traces"
    (resource,) = sent.resource_spans
    assert "tdm-serve" in {attribute.value.string_value for attribute in resource.resource.attributes}
    made = [span for scope in resource.scope_spans for span in scope.spans]
    assert [span.name for span in made].count("denoise") == 2
    (root,) = [span for span in made if span.name == "POST /v1/images/generations"]
    assert root.trace_id.hex() == TRACE_ID
    assert {a.key: a.value.int_value for a in root.attributes} == {"tdm.n": 3}
    assert {span.parent_span_id for span in made if span is not root} == {root.span_id}
