"""Arrival times of requests, and the order in which they are handled."""

from __future__ import annotations

import asyncio
import time
from contextvars import ContextVar

_arrived_s: ContextVar[float | None] = ContextVar("arrived_s", default=None)


def arrive(ago_s: float = 0.0) -> None:
    """Record that the request of this task, and of tasks that it starts, arrived `ago_s` seconds ago."""
    _arrived_s.set(time.monotonic() - ago_s)


def since_arrival_s() -> float:
    """Return the seconds since the request of this task arrived; 0 if the task belongs to no request."""
    arrived_s = _arrived_s.get()
    return 0.0 if arrived_s is None else time.monotonic() - arrived_s


class Turnstile:
    """Lets one request pass per turn of the event loop, in order of arrival.

    Each request takes time until it waits for the engine. When many arrive at once, an answer that is ready waits for
    one of them and not for all.
    """

    def __init__(self) -> None:
        self._lock = asyncio.Lock()

    async def passed(self) -> None:
        """Wait for the request's turn. Return at once if no other request has passed in this turn of the loop."""
        await self._lock.acquire()
        asyncio.get_running_loop().call_soon(self._lock.release)
