"""What metrics and spans say of orders and answers, whichever process the engine runs in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from serving.arrival import since_arrival_s
from serving.errors import from_exception
from serving.schema.answers import ImageAnswer
from serving.schema.order import ImageOrder
from serving.telemetry.metrics import ServerMetrics
from serving.telemetry.tracing import FIRST_SERVER_ERROR, current_span


@contextlib.contextmanager
def accounted(order: ImageOrder, backend: str, metrics: ServerMetrics) -> Iterator[None]:
    """Describe an order in its span. Count its latency budget if it was accepted but is not answered.

    Args:
        backend: backend of the order's model.
    """
    if (span := current_span()) is not None:
        first = order.pictures[0]
        span.set(
            {
                "tdm.model": order.model,
                "tdm.backend": backend,
                "tdm.num_inference_steps": first.num_inference_steps,
                "tdm.size": f"{first.width}x{first.height}",
                "tdm.n": len(order.pictures),
            }
        )
    has_budget = order.delivery.latency_budget_ms is not None
    try:
        yield
    except Exception as error:
        if has_budget and from_exception(error).status >= FIRST_SERVER_ERROR:  # others are refusals
            metrics.observe_unanswered(has_failed=True)
        raise
    except BaseException:  # its client left
        if has_budget:
            metrics.observe_unanswered(has_failed=False)
        raise


def account(order: ImageOrder, answer: ImageAnswer, metrics: ServerMetrics) -> None:
    """Count an answer, and add its stages to the request's span."""
    if (span := current_span()) is not None:
        span.set({"tdm.num_inference_steps": max(image.num_inference_steps for image in answer.images)})
        span.record_stages(answer.timings, answer.waits_ms, 1e3 * since_arrival_s())
    if not order.delivery.is_background:
        metrics.observe_request(answer.timings, answer.latency_budget_kept, answer.late_by)
    for image in answer.images:
        metrics.steps_used.labels(image.num_inference_steps).inc()
