"""The replica's own HTTP server: uvicorn on the server's port, in the replica's event loop.

A request crosses no process on its way to the engine; crossing one is most of what Ray's proxy costs
(docs/performance.md). This module does what that proxy did: request ids, cancelling for clients that
leave, and limits on what a client may send before the application sees it.
"""

from __future__ import annotations

import asyncio
import logging
import os
from array import array
from asyncio import TimerHandle
from typing import Any

import httptools
import uvicorn
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.config import HTTP_PROTOCOLS
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serving.fronts.address import bind
from serving.fronts.edge import request_id_of

LIVE_PATH = "/v1/images/live"
"""The only path of a websocket; any other offer of one is passed over."""
HEAD_TIMEOUT_S = 10.0
"""Longest time from a request's first byte to the end of its headers."""
KEEP_ALIVE_S = 90
"""Seconds after which an idle connection is closed. Load balancers close after 60 s, so that none uses a closed one."""
MAX_OVERHEAD_BYTES = 64 * 1024
"""Largest size of one request without its body: request line, headers, chunk sizes and trailers."""
BACKLOG = 2048
"""Most connections that the kernel queues while the event loop is busy."""


class HTTPFront:
    """A listening HTTP server, created by `start`."""

    def __init__(self, server: uvicorn.Server, serving: asyncio.Task[None]) -> None:
        self._server = server
        self._serving = serving

    @classmethod
    async def start(cls, app: ASGIApp, host: str, port: int, max_message_bytes: int) -> HTTPFront:
        """Start to listen and answer.

        Args:
            max_message_bytes: largest message of a websocket.

        Raises:
            OSError: the server cannot listen on the address.
        """
        listener = bind(host, port)
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # broken HTTP of clients needs no log line
        config = uvicorn.Config(
            RequestId(CancelForLeavers(app)),
            http=BoundedHTTP,
            ws="websockets-sansio",
            ws_max_size=max_message_bytes,
            ws_per_message_deflate=False,  # pictures are compressed
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            backlog=BACKLOG,
        )
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        if serving.done():
            serving.result()
        return cls(server, serving)

    @property
    def is_running(self) -> bool:
        """Whether the server listens."""
        return not self._serving.done()

    async def close(self) -> None:
        """Stop listening and close idle connections. Return when the kernel has every open answer."""
        self._server.should_exit = True
        await asyncio.shield(self._serving)


class RequestId:
    """Gives each request an `x-request-id`, the client's where it is valid, and sends it back."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked = MutableHeaders(scope=scope)
        request_id = asked["x-request-id"] = request_id_of(asked.get("x-request-id", ""))

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        await self.app(scope, receive, send_with_id)


class CancelForLeavers:
    """Cancels the application when the client leaves before the answer is complete.

    uvicorn reports a disconnect only to an application that calls `receive`; one that waits for a picture does not.
    Watching begins when the body has been read, so a request whose body is not read is always answered to the end.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # its application reads until the client leaves
            await self.app(scope, receive, send)
            return
        answering = asyncio.current_task()
        assert answering is not None, "ASGI servers run an application in a task"
        watching: asyncio.Task[Message] | None = None
        is_answered = has_left = False

        async def wait_for_end() -> Message:
            nonlocal has_left
            while (message := await receive())["type"] != "http.disconnect":
                pass  # it comes when the client leaves and when the answer is complete
            if not is_answered:
                has_left = True
                answering.cancel()
            return message

        async def receive_and_watch() -> Message:
            nonlocal watching
            if watching is not None:
                return await asyncio.shield(watching)
            message = await receive()
            if message["type"] == "http.request" and not message.get("more_body", False):
                watching = asyncio.create_task(wait_for_end())
            return message

        async def send_and_note(message: Message) -> None:
            nonlocal is_answered
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                is_answered = True
            await send(message)

        try:
            await self.app(scope, receive_and_watch, send_and_note)
        except asyncio.CancelledError:
            if not has_left:
                raise
            answering.uncancel()  # the client is gone; there is nothing to send
        finally:
            if watching is not None:
                watching.cancel()


def configure_ray_proxy() -> list[Middleware]:
    """Give Ray's proxy this module's HTTP. Called by Ray in its process, before the proxy listens.

    Its uvicorn would believe forwarded headers of every local client; the application reads them (`web/proxied.py`).

    Returns:
        No middleware, which is what Ray asks for.
    """
    os.environ["FORWARDED_ALLOW_IPS"] = ""
    HTTP_PROTOCOLS["auto"] = f"{__name__}:{BoundedHTTP.__name__}"
    return []


class DecliningParser(httptools.HttpRequestParser):
    """Parser that reads on where a request offers another protocol that is not taken.

    By itself httptools takes such a request for complete at the end of its headers, and its body for the next
    request. Here the head is parsed a second time, without its `Upgrade`.
    """

    def __init__(self, protocol: BoundedHTTP) -> None:
        self._protocol = protocol
        self._start()

    def _start(self) -> None:
        """Make it ready for a request, whatever it parsed before."""
        super().__init__(self._protocol)
        self.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does

    def feed_data(self, data: bytes | bytearray | memoryview | array[int]) -> None:
        """Parse what the connection brought.

        Raises:
            httptools.HttpParserError: it is not HTTP.
        """
        rest = memoryview(data)
        while True:
            try:
                super().feed_data(rest)
                return
            except httptools.HttpParserUpgrade as offer:
                if self._protocol._should_upgrade():
                    raise
                rest = rest[offer.args[0] :]
                head = self._protocol.head_without_upgrade()
                self._start()  # `Connection: close` beside the offer would have ended it
                super().feed_data(head)


class BoundedHTTP(HttpToolsProtocol):
    """uvicorn's fast parser with limits; by itself it accepts headers of any size, waits without end, and stops
    at an upgrade."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.parser = DecliningParser(self)
        self._overhead_bytes = 0
        self._head_timer: TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.timeout_keep_alive_task = self.loop.call_later(KEEP_ALIVE_S, self.timeout_keep_alive_handler)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._overhead_bytes += len(data)
        super().data_received(data)
        if self._overhead_bytes > MAX_OVERHEAD_BYTES and not self.transport.is_closing():
            if self.cycle is None or self.cycle.response_complete:
                self.send_400_response(f"The request's headers are larger than {MAX_OVERHEAD_BYTES} bytes.")
            else:
                self.transport.close()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self.transport.close)

    def on_headers_complete(self) -> None:
        self._stop_head_timer()
        if self.parser.get_method() == b"CONNECT":
            raise ValueError("no tunnels")  # uvicorn answers with 400 and closes: a tunnel's bytes are no requests
        if not self.parser.should_upgrade() or self._should_upgrade():
            super().on_headers_complete()

    def _should_upgrade(self) -> bool:
        """Whether the request that is being read opens a websocket; uvicorn asks, too."""
        path = self.url.partition(b"?")[0]
        is_live = self.parser.get_method() == b"GET" and path.endswith(LIVE_PATH.encode())  # after a proxy's prefix
        return is_live and super()._should_upgrade()

    def head_without_upgrade(self) -> bytes:
        """The head of the request that is being read, as if it offered no protocol."""
        kept = [b"%b: %b\r\n" % header for header in self.headers if header[0] != b"upgrade"]
        version = self.parser.get_http_version().encode()
        return b"%b %b HTTP/%b\r\n%b\r\n" % (self.parser.get_method(), self.url, version, b"".join(kept))

    def on_body(self, body: bytes) -> None:
        self._overhead_bytes -= len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        if not self.parser.should_upgrade():
            self._overhead_bytes = 0
            super().on_message_complete()

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
