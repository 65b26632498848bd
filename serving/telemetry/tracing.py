"""OpenTelemetry traces: a span a request, its stages below it. No SDK is imported where tracing is off.

A front opens `request_span` around a request; the services below find it by `current_span`. Attributes are
sizes and names of what is served: never a prompt, a key or an error's message, which may quote the prompt.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from serving.config import ServerConfig
from tdm_runtime.engine.sample import Timings

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span, Tracer

SERVICE_NAME = "tdm-serve"
TRACES_PATH = "/v1/traces"
"""Beneath the endpoint, as the standard has it."""
FIRST_SERVER_ERROR = 500

_current: ContextVar[RequestSpan | None] = ContextVar("request_span", default=None)


def current_span() -> RequestSpan | None:
    """Of the request that is being answered; None where nobody traces it."""
    return _current.get()


def request_span(
    tracing: Tracing | None, headers: Mapping[str, str], name: str
) -> AbstractContextManager[RequestSpan | None]:
    """A server span around one request, a child of the caller's where `headers` have a `traceparent`.

    Args:
        headers: by lower-case name; of gRPC, its metadata.
        name: of few values, as "POST /v1/images/generations".
    """
    return nullcontext() if tracing is None else tracing.request_span(headers, name)


class RequestSpan:
    """One request's span."""

    def __init__(self, tracer: Tracer, span: Span) -> None:
        self._tracer = tracer
        self._span = span
        known = span.get_span_context()
        self.trace_id = f"{known.trace_id:032x}"
        self.traceparent = f"00-{self.trace_id}-{known.span_id:016x}-{known.trace_flags:02x}"

    def rename(self, name: str) -> None:
        """Where the route is known only later."""
        self._span.update_name(name)

    def set(self, attributes: Mapping[str, Any]) -> None:
        """Say more of the request."""
        self._span.set_attributes(attributes)

    def fail(self, code: str | None, status: int) -> None:
        """The request was refused, failed or was given up.

        Args:
            code: as the client is told it.
            status: HTTP's; from 500 on it is the server's error, and the span's.
        """
        from opentelemetry.trace import Status, StatusCode

        self._span.set_attribute("error.type", code or str(status))
        if status >= FIRST_SERVER_ERROR:
            self._span.set_status(Status(StatusCode.ERROR))

    def record_stages(self, timings: Timings, encode_ms: float, total_ms: float) -> None:
        """Add the stages of a request that ends now.

        What lies between two of them was spent waiting for others' calls.

        Args:
            timings: of its slowest picture; a picture that was not made for it has none.
        """
        if not self._span.is_recording():
            return
        from opentelemetry.trace import set_span_in_context

        parent = set_span_in_context(self._span)
        now_ns = time.time_ns()
        for name, start_ms, duration_ms, attributes in _stages(timings, encode_ms, total_ms):
            start_ns = now_ns - int(1e6 * (total_ms - start_ms))
            span = self._tracer.start_span(name, parent, attributes=attributes, start_time=start_ns)
            span.end(start_ns + int(1e6 * duration_ms))


def _stages(timings: Timings, encode_ms: float, total_ms: float) -> Iterator[tuple[str, float, float, dict[str, int]]]:
    """Name, start after the request's own and duration, both in milliseconds, and attributes."""
    if timings.waits_ms:
        first_wait_ms, *step_waits_ms, decode_wait_ms = timings.waits_ms
        yield "queue", 0.0, first_wait_ms, {}
        yield "text", first_wait_ms, timings.text_ms, {}
        at_ms = first_wait_ms + timings.text_ms
        for number, (wait_ms, step_ms) in enumerate(zip(step_waits_ms, timings.steps_ms, strict=True), 1):
            yield "denoise", at_ms + wait_ms, step_ms, {"tdm.step": number}
            at_ms += wait_ms + step_ms
        yield "decode", at_ms + decode_wait_ms, timings.decode_ms, {}
    yield "encode", total_ms - encode_ms, encode_ms, {}


class Tracing:
    """Makes spans and sends them off, beside the requests."""

    def __init__(self, exporters: Sequence[SpanExporter]) -> None:
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        resource = Resource.create({"service.name": SERVICE_NAME}).merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource)
        for exporter in exporters:
            self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("tdm_serve")

    @classmethod
    def start(cls, config: ServerConfig) -> Tracing | None:
        """What the settings ask for; None where that is nothing.

        Raises:
            OSError: the trace file cannot be written.
        """
        exporters: list[SpanExporter] = []
        if config.trace_file is not None:
            from opentelemetry.sdk.trace.export import ConsoleSpanExporter

            stream = config.trace_file.open("a", encoding="utf-8")
            exporters.append(ConsoleSpanExporter(out=stream, formatter=lambda span: span.to_json(indent=None) + "\n"))
        if config.otlp_endpoint is not None:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

            exporters.append(OTLPSpanExporter(config.otlp_endpoint.rstrip("/") + TRACES_PATH))
        return cls(exporters) if exporters else None

    @contextmanager
    def request_span(self, headers: Mapping[str, str], name: str) -> Iterator[RequestSpan]:
        """As the function of this name."""
        from opentelemetry.context import Context
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        parent = TraceContextTextMapPropagator().extract(headers, Context())
        span = self._tracer.start_span(name, parent, SpanKind.SERVER)
        request = RequestSpan(self._tracer, span)
        before = _current.set(request)
        try:
            yield request
        finally:
            _current.reset(before)
            span.end()

    def close(self) -> None:
        """Send off what is left."""
        self._provider.shutdown()
