"""The caller and the deadline of a gRPC call."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import grpc

from serving.arrival import since_arrival_s
from serving.errors import APIError
from serving.fronts.access import Caller
from serving.images.interface import Images
from serving.schema.answers import ImageAnswer, PartialAnswer
from serving.schema.image_request import MAX_BUDGET_MS
from serving.schema.order import ImageOrder
from tdm_runtime.errors import InvalidRequestError

DEADLINE_MARGIN_MS = 5.0
"""Part of the time to a call's deadline that is reserved for sending the answer, in milliseconds."""
NO_DEADLINE_BUDGET = ("x-tdm-deadline-budget", "off")
"""Metadata of a call whose deadline is not a latency budget."""


@dataclass(frozen=True)
class Call:
    """One admitted call."""

    caller: Caller
    context: grpc.aio.ServicerContext

    def budget_ms(self) -> float | None:
        """Return the time from arrival to deadline, in milliseconds; None if the deadline is not a latency budget."""
        remaining_s = self.context.time_remaining()
        if remaining_s is None or NO_DEADLINE_BUDGET in tuple(self.context.invocation_metadata() or ()):
            return None
        budget_ms = 1e3 * (float(remaining_s) + since_arrival_s()) - DEADLINE_MARGIN_MS
        return budget_ms if budget_ms <= MAX_BUDGET_MS else None


_current: ContextVar[Call] = ContextVar("call")


def enter(call: Call) -> None:
    """Set the call of this task."""
    _current.set(call)


def current_call() -> Call:
    """Return the call that this task answers."""
    return _current.get()


@contextmanager
def budgeted(order: ImageOrder) -> Iterator[ImageOrder]:
    """Give an order without a latency budget the call's deadline as one.

    Raises:
        APIError: 504, the deadline leaves too little.
    """
    budget_ms = None if order.delivery.latency_budget_ms is not None else current_call().budget_ms()
    if budget_ms is None:
        yield order
        return
    if budget_ms <= 0:
        raise _too_soon(
            f"it leaves {budget_ms + DEADLINE_MARGIN_MS:.3g} ms and sending the answer takes {DEADLINE_MARGIN_MS:g} ms"
        )
    try:
        yield order.within(budget_ms)
    except (InvalidRequestError, APIError) as error:
        if error.code != "latency_budget_too_small":
            raise
        raise _too_soon(str(error)) from None


async def made(images: Images, order: ImageOrder) -> ImageAnswer:
    """Make an order for the caller, who pays for it, within the call's deadline.

    Raises:
        APIError: see `budgeted`; and as `Images.generate`.
    """
    with budgeted(order) as within:
        current_call().caller.spend(within.cost)
        return await images.generate(within)


async def streamed(images: Images, order: ImageOrder) -> AsyncIterator[PartialAnswer | ImageAnswer]:
    """Make an order as `made` does, and yield its previews and then the answer."""
    with budgeted(order) as within:
        current_call().caller.spend(within.cost)
        parts = await images.stream(within)
    async for part in parts:
        yield part


def _too_soon(reason: str) -> APIError:
    message = f"the call's deadline is its latency budget: {reason}"
    headers = {"x-should-retry": "false"}
    return APIError(504, message, param="latency_budget_ms", code="latency_budget_too_small", headers=headers)
