"""OpenTelemetry traces: one span per request, with its stages as children. No SDK is imported if tracing is off.

A front opens `request_span` around a request, and the services behind it find the span with `current_span`. Attributes
are sizes and names, never a prompt, a key or the message of an error, which may quote the prompt.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from serving.config import ServerConfig
from serving.schema.answers import ImageTimings

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span, Tracer

SERVICE_NAME = "tdm-serve"
TRACES_PATH = "/v1/traces"
"""Path below the endpoint, from the OTLP standard."""
FIRST_SERVER_ERROR = 500

_current: ContextVar[RequestSpan | None] = ContextVar("request_span", default=None)


def current_span() -> RequestSpan | None:
    """Return the span of the current request; None if it is not traced."""
    return _current.get()


def request_span(
    tracing: Tracing | None, headers: Mapping[str, str], name: str
) -> AbstractContextManager[RequestSpan | None]:
    """Return the span of one request. With a `traceparent` in `headers`, it is a child of the caller's span.

    Args:
        headers: headers, or metadata of gRPC, by lower-case name.
        name: one of few names, such as "POST /v1/images/generations".
    """
    return nullcontext() if tracing is None else tracing.request_span(headers, name)


class RequestSpan:
    """Span of one request."""

    def __init__(self, tracer: Tracer, span: Span) -> None:
        self._tracer = tracer
        self._span = span
        known = span.get_span_context()
        self.trace_id = f"{known.trace_id:032x}"
        self.traceparent = f"00-{self.trace_id}-{known.span_id:016x}-{known.trace_flags:02x}"

    def rename(self, name: str) -> None:
        """Change the name, once the route is known."""
        self._span.update_name(name)

    def set(self, attributes: Mapping[str, Any]) -> None:
        """Add attributes of the request."""
        self._span.set_attributes(attributes)

    def fail(self, code: str | None, status: int) -> None:
        """Record that the request was refused or failed, or that its client left.

        Args:
            code: error code that the client receives.
            status: HTTP status. From 500 on, the span is marked as an error.
        """
        from opentelemetry.trace import Status, StatusCode

        self._span.set_attribute("error.type", code or str(status))
        if status >= FIRST_SERVER_ERROR:
            self._span.set_status(Status(StatusCode.ERROR))

    def record_stages(self, timings: ImageTimings, waits_ms: Sequence[float], elapsed_ms: float) -> None:
        """Add the stages of a request. Gaps between them are time spent waiting for other calls.

        Args:
            timings: timings of the slowest picture.
            waits_ms: its waits, see `ImageAnswer.waits_ms`.
            elapsed_ms: time since the request arrived.
        """
        if not self._span.is_recording():
            return
        from opentelemetry.trace import set_span_in_context

        parent = set_span_in_context(self._span)
        now_ns = time.time_ns()
        for name, start_ms, duration_ms, attributes in _stages(timings, waits_ms):
            start_ns = now_ns - int(1e6 * (elapsed_ms - start_ms))
            span = self._tracer.start_span(name, parent, attributes=attributes, start_time=start_ns)
            span.end(start_ns + int(1e6 * duration_ms))


def _stages(timings: ImageTimings, waits_ms: Sequence[float]) -> Iterator[tuple[str, float, float, dict[str, int]]]:
    """Yield name, start, duration and attributes of each stage, in milliseconds from the start of the request."""
    if waits_ms:
        first_wait_ms, *step_waits_ms, decode_wait_ms = waits_ms
        yield "queue", 0.0, first_wait_ms, {}
        yield "text", first_wait_ms, timings.text_ms, {}
        at_ms = first_wait_ms + timings.text_ms
        if timings.image_ms:
            yield "image", at_ms, timings.image_ms, {}
            at_ms += timings.image_ms
        for number, (wait_ms, step_ms) in enumerate(zip(step_waits_ms, timings.steps_ms, strict=True), 1):
            yield "denoise", at_ms + wait_ms, step_ms, {"tdm.step": number}
            at_ms += wait_ms + step_ms
        yield "decode", at_ms + decode_wait_ms, timings.decode_ms, {}
    yield "encode", timings.total_ms - timings.encode_ms, timings.encode_ms, {}


class Tracing:
    """Makes spans and exports them in the background."""

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
        """Start the tracing of a configuration. Returns None if it asks for none.

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
        """Open the span of one request, see the function `request_span`."""
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
        """Export the remaining spans and stop."""
        self._provider.shutdown()
