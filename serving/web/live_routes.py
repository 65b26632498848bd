"""GET /v1/images/live: a websocket on which pictures follow what a client types or draws."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from contextlib import aclosing
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, WebSocket
from starlette.datastructures import Headers
from starlette.websockets import WebSocketDisconnect, WebSocketState

from serving.arrival import arrive
from serving.errors import APIError, invalid
from serving.fronts.edge import admit, note_error, reading_pictures, recorded, request_id_of, too_many
from serving.fronts.services import Services
from serving.schema.edit_request import edit_order_from_fields, is_edit
from serving.schema.image_request import order_from_fields
from serving.schema.image_response import to_edit_event, to_event
from serving.schema.order import ImageOrder
from serving.schema.parsing import picture_fields
from serving.web.http_front import LIVE_PATH
from tdm_runtime.params import MAX_SEED

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 64
KEY_PROTOCOL = "openai-insecure-api-key."
"""Subprotocol that brings a key, as in OpenAI's Realtime API: browsers send no `Authorization` with a websocket."""
GIVE_UP_S = 0.1
"""A picture that needs longer than this is given up for a newer message, but never two in a row."""
RESTARTING = 1012
"""Code that closes a connection when the server stops (RFC 6455, registry of close codes)."""


def add_live_routes(app: FastAPI, services: Services) -> None:
    """Add the websocket."""
    connections = set[WebSocket]()

    @app.websocket(LIVE_PATH)
    async def live(websocket: WebSocket) -> None:
        headers = websocket.headers
        request_id = request_id_of(headers.get("x-request-id", ""))
        with recorded(services, headers, request_id, "GET", f"GET {LIVE_PATH}", is_status=False):
            try:
                check_origin(headers)
                authorization = authorization_of(headers)
                admit(services, authorization, is_status=False)
                if len(connections) >= MAX_CONNECTIONS:
                    raise too_many(f"{MAX_CONNECTIONS} live connections are open")
            except APIError as error:
                services.metrics.observe_answer("GET", LIVE_PATH, error.status)
                await websocket.send_denial_response(note_error(error, services, request_id).to_response())
                return
            services.metrics.observe_answer("GET", LIVE_PATH, 101)
            connections.add(websocket)
            live = Live(websocket, services, authorization, request_id)
            try:
                # A server that names no protocol would be refused by a browser that offers some.
                offered = [name for name in websocket.scope["subprotocols"] if not name.startswith(KEY_PROTOCOL)]
                await websocket.accept(offered[0] if offered else None)
                await live.run()
            finally:
                connections.discard(websocket)
                logger.info(
                    "%s: %d pictures of %d messages %r", LIVE_PATH, live.num_made, live.num_received, request_id
                )


def check_origin(headers: Headers) -> None:
    """Check that a browser's page is of this server. Without it any page that a user opens could use the server.

    Raises:
        APIError: 403.
    """
    origin = headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != headers.get("host"):
        message = f"the page is of {origin[:80]!r}; only pages of {headers.get('host')!r} may open a live connection"
        raise invalid(message, None, "foreign_origin", 403)


def authorization_of(headers: Headers) -> str | None:
    """Return the `Authorization` of a client, or what stands for it among the subprotocols."""
    offered = [name.strip() for name in headers.get("sec-websocket-protocol", "").split(",")]
    key = next((name.removeprefix(KEY_PROTOCOL) for name in offered if name.startswith(KEY_PROTOCOL)), None)
    return headers.get("authorization") if key is None else f"Bearer {key}"


class Live:
    """One connection. A message is a whole request; of those that wait, the newest alone is answered."""

    def __init__(self, websocket: WebSocket, services: Services, authorization: str | None, request_id: str) -> None:
        self.num_received = self.num_made = 0
        self._websocket = websocket
        self._services = services
        self._authorization = authorization
        self._request_id = request_id
        self._seed = secrets.randbelow(MAX_SEED + 1)  # of messages without one, so that pictures do not flicker
        self._newest = b""
        self._received_s = 0.0
        self._has_newer = asyncio.Event()
        self._typical_s = 0.0

    async def run(self) -> None:
        """Answer until the client leaves or the server stops."""
        tasks = {asyncio.create_task(self._receive()), asyncio.create_task(self._follow())}
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except WebSocketDisconnect:
            pass
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _receive(self) -> None:
        while True:
            message = await self._websocket.receive()
            if message["type"] == "websocket.disconnect":
                raise WebSocketDisconnect(message["code"])
            self._newest = message.get("bytes") or (message.get("text") or "").encode()
            self._received_s = time.monotonic()
            self.num_received += 1
            self._has_newer.set()

    async def _follow(self) -> None:
        """Make one picture after the other, each of the newest message."""
        may_give_up = True
        while True:
            await self._has_newer.wait()
            self._has_newer.clear()
            began_s = time.monotonic()
            making = asyncio.create_task(self._answer(self._newest, self.num_received, self._received_s))
            newer = asyncio.create_task(self._has_newer.wait())
            try:
                await asyncio.wait({making, newer}, return_when=asyncio.FIRST_COMPLETED)
                left_s = began_s + self._typical_s - time.monotonic()
                if not making.done() and may_give_up and left_s > GIVE_UP_S:
                    may_give_up = False
                    continue
                await making
                may_give_up = True
            finally:
                newer.cancel()
                making.cancel()
                await asyncio.wait({making})
            self._typical_s = time.monotonic() - began_s
            if self._services.is_draining:
                await self._websocket.close(RESTARTING)
                return

    async def _answer(self, body: bytes, number: int, received_s: float) -> None:
        """Send the picture of a message with its previews, or the reason why there is none."""
        services = self._services
        arrive(time.monotonic() - received_s)
        services.num_active += 1
        try:
            caller = admit(services, self._authorization, is_status=False)  # the key may have been withdrawn
            await services.turnstile.passed()
            with reading_pictures(services):
                order, changes_picture = await asyncio.to_thread(self._order, body)
            caller.spend(order.cost)
            parts = await services.images.stream(order)
            async with aclosing(parts):  # type: ignore[type-var]
                async for part in parts:
                    event = to_edit_event(part) if changes_picture else to_event(part)
                    await self._send(event.model_dump(mode="json"), number, received_s)
            self.num_made += 1
        except WebSocketDisconnect:
            raise
        except Exception as error:
            answer = note_error(error, services, self._request_id)
            body_of_error: dict[str, Any] = {"type": "error", "status": answer.status, **answer.to_body()}
            wait_ms = answer.headers.get("retry-after-ms")
            await self._send(body_of_error | {"retry_after_ms": wait_ms and float(wait_ms)}, number, received_s)
        finally:
            services.num_active -= 1

    def _order(self, body: bytes) -> tuple[ImageOrder, bool]:
        """Return the order of a message, and whether it changes a given picture."""
        fields = picture_fields(body) | {"stream": True}
        recipe_of = self._services.images.recipe
        if not is_edit({name for name, value in fields.items() if value is not None}):
            return order_from_fields(fields, recipe_of, self._seed), False
        return edit_order_from_fields(fields, recipe_of, default_seed=self._seed), True

    async def _send(self, event: dict[str, Any], number: int, received_s: float) -> None:
        latency_ms = round(1e3 * (time.monotonic() - received_s), 2)
        if self._websocket.application_state is WebSocketState.CONNECTED:
            await self._websocket.send_text(json.dumps({"message": number, "latency_ms": latency_ms, **event}))
