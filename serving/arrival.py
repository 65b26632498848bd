"""When requests arrive, and in which order they get their turn."""

from __future__ import annotations

import asyncio
import time
from contextvars import ContextVar

_arrived_s: ContextVar[float | None] = ContextVar("arrived_s", default=None)


def arrive(ago_s: float = 0.0) -> None:
    """The request of this task, and of those that it starts, arrived now, or some seconds ago."""
    _arrived_s.set(time.monotonic() - ago_s)


def since_arrival_s() -> float:
    """Seconds since the request arrived; 0 for work that is nobody's request."""
    arrived_s = _arrived_s.get()
    return 0.0 if arrived_s is None else time.monotonic() - arrived_s


class Turnstile:
    """Lets one request a turn of the event loop pass, the first first.

    What many that arrive at once take until they wait for the engine adds up; so answers that are ready do not
    wait for all of them, but for one.
    """

    def __init__(self) -> None:
        self._lock = asyncio.Lock()

    async def passed(self) -> None:
        """Wait for one's turn; at once where nobody else has come in this turn of the loop."""
        await self._lock.acquire()
        asyncio.get_running_loop().call_soon(self._lock.release)
