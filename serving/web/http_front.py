"""The replica's own HTTP front: uvicorn on the server's port, in the replica's event loop.

A request crosses no process on its way to the engine, which is most of what Ray's proxy costs
(docs/performance.md). What that proxy did is done here: request ids, cancelling for clients that
leave, and limits on what a client may send before the application sees it.
"""

from __future__ import annotations

import asyncio
import logging
from asyncio import TimerHandle
from typing import Any

import uvicorn
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serving.fronts.address import bind
from serving.fronts.edge import request_id_of

HEAD_TIMEOUT_S = 10.0
"""Time from a request's first byte to the end of its headers."""
KEEP_ALIVE_S = 90
"""Idle connections are closed after it: later than load balancers do (60 s), so that none sends into a closed one."""
MAX_OVERHEAD_BYTES = 64 * 1024
"""Of one request: request line, headers, chunk sizes, trailers. The body has its own limit (`ServerConfig`)."""
BACKLOG = 2048
"""Connections that the kernel keeps for a busy event loop."""


class HTTPFront:
    """A listening server. Made by `start`."""

    def __init__(self, server: uvicorn.Server, serving: asyncio.Task[None]) -> None:
        self._server = server
        self._serving = serving

    @classmethod
    async def start(cls, app: ASGIApp, host: str, port: int) -> HTTPFront:
        """Listen, and answer from now on.

        Raises:
            OSError: the address cannot be listened on.
        """
        listener = bind(host, port)
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # a client's broken HTTP is no news
        config = uvicorn.Config(
            RequestId(CancelForLeavers(app)),
            http=BoundedHTTP,
            ws="none",
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
        """False once it was closed, or failed."""
        return not self._serving.done()

    async def close(self) -> None:
        """Stop listening; return when every open answer was handed to the kernel. Idle connections are closed."""
        self._server.should_exit = True
        await asyncio.shield(self._serving)


class RequestId:
    """Answer with the client's `x-request-id`; make one where there is none, or none that a header may hold."""

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
    """Cancel the application when its client goes before the answer is complete.

    uvicorn only tells an application that asks, and one that waits for a picture does not ask. Watching
    begins when the body has been read, so a request that reads none is answered to the end.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answering = asyncio.current_task()
        assert answering is not None, "ASGI servers run an application in a task"
        watching: asyncio.Task[Message] | None = None
        is_answered = has_left = False

        async def wait_for_end() -> Message:
            nonlocal has_left
            while (message := await receive())["type"] != "http.disconnect":
                pass  # it comes when the client left, and when the answer is complete
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
            answering.uncancel()  # nobody is left to be told
        finally:
            if watching is not None:
                watching.cancel()


class BoundedHTTP(HttpToolsProtocol):
    """uvicorn's fast parser, which by itself keeps headers of any size for any time."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
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
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._overhead_bytes -= len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._overhead_bytes = 0
        super().on_message_complete()

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
