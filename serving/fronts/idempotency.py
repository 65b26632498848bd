"""Answers by `Idempotency-Key`. A client that lost an answer repeats its request and gets the same answer."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from fastapi import Response

from serving.errors import invalid, reused_key
from tdm_runtime.params import MAX_SEED

KEEP_S = 24 * 3600.0
MAX_BYTES = 64 * 2**20
"""Most bytes of kept answers. The oldest are dropped first."""
MAX_KEY_CHARACTERS = 255


@dataclass
class _Entry:
    body_sha256: str
    answer: asyncio.Future[Response] = field(default_factory=asyncio.Future)
    num_bytes: int = 0
    asked_s: float = field(default_factory=time.monotonic)


def check_key(key: str) -> None:
    """Check an idempotency key.

    Raises:
        APIError: 400, the key is empty, too long or not printable.
    """
    if not (0 < len(key) <= MAX_KEY_CHARACTERS and key.isascii() and key.isprintable()):
        message = f"Idempotency-Key has {len(key)} characters; send 1 to {MAX_KEY_CHARACTERS} printable ASCII ones"
        raise invalid(message, "Idempotency-Key", "invalid_idempotency_key")


def seed_of(caller: str, key: str) -> int:
    """Return the seed of a request without one. Another replica, or this one later, makes the same picture."""
    digest = hashlib.sha256(f"{caller}\0{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % (MAX_SEED + 1)


class Replays:
    """Answers by caller and key, including those that are still being made. Belongs to one event loop."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._entries: OrderedDict[tuple[str, str], _Entry] = OrderedDict()

    async def once(self, caller: str, key: str, body: bytes, make: Callable[[], Awaitable[Response]]) -> Response:
        """Return the answer to this key. If there is none, make it. Failures are not kept.

        Raises:
            APIError: 400, the key is not valid; 422, the key was used with another body.
        """
        check_key(key)
        self._forget_old()
        sha256 = hashlib.sha256(body).hexdigest()
        while entry := self._entries.get((caller, key)):
            if entry.body_sha256 != sha256:
                raise reused_key(key)
            try:
                return await asyncio.shield(entry.answer)
            except asyncio.CancelledError:
                if not entry.answer.cancelled():
                    raise  # this client left
        return await self._make((caller, key), sha256, make)

    async def _make(self, name: tuple[str, str], sha256: str, make: Callable[[], Awaitable[Response]]) -> Response:
        entry = self._entries[name] = _Entry(sha256)
        try:
            answer = await make()
        except BaseException:
            del self._entries[name]
            entry.answer.cancel()  # a waiting request makes the answer instead
            raise
        entry.answer.set_result(answer)
        entry.num_bytes = len(answer.body)
        self._num_bytes += entry.num_bytes
        return answer

    def _forget_old(self) -> None:
        too_old_s = time.monotonic() - KEEP_S
        while self._entries:
            name, oldest = next(iter(self._entries.items()))
            if not oldest.answer.done() or (self._num_bytes <= self._max_bytes and oldest.asked_s >= too_old_s):
                return
            self._num_bytes -= oldest.num_bytes
            del self._entries[name]
