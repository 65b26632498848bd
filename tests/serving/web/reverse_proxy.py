"""A reverse proxy that serves a server under a path, as nginx and Traefik do."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from aiohttp import ClientSession, web

from tests.ports import free_port

PREFIX = "/art/pictures"
HOP_BY_HOP = {"transfer-encoding", "connection", "content-length"}


@contextmanager
def reverse_proxy(server_url: str, scheme: str = "http") -> Iterator[str]:
    """Run a proxy that strips `PREFIX` from paths and says so in its headers. Yields the URL of the server behind it.

    Args:
        scheme: scheme that the proxy claims its clients use.
    """
    port, loop = free_port(), asyncio.new_event_loop()
    host = f"127.0.0.1:{port}"

    async def forward(request: web.Request) -> web.StreamResponse:
        stated = {"X-Forwarded-Proto": scheme, "X-Forwarded-Host": host, "X-Forwarded-Prefix": PREFIX}
        url = f"{server_url}/{request.path_qs.removeprefix(PREFIX).lstrip('/')}"
        kept = {name: value for name, value in request.headers.items() if name.lower() != "host"}
        ask = session.request(
            request.method, url, headers=kept | stated, data=await request.read(), allow_redirects=False
        )
        async with ask as answer:
            headers = {name: value for name, value in answer.headers.items() if name.lower() not in HOP_BY_HOP}
            sent = web.StreamResponse(status=answer.status, headers=headers)
            await sent.prepare(request)
            async for chunk in answer.content.iter_any():
                await sent.write(chunk)
            return sent

    async def start() -> tuple[ClientSession, web.AppRunner]:
        app = web.Application()
        app.router.add_route("*", f"{PREFIX}{{rest:.*}}", forward)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        return ClientSession(auto_decompress=False), runner

    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    session, runner = asyncio.run_coroutine_threadsafe(start(), loop).result(timeout=20)
    try:
        yield f"http://{host}{PREFIX}"
    finally:
        for closing in (session.close(), runner.cleanup()):
            asyncio.run_coroutine_threadsafe(closing, loop).result(timeout=20)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(timeout=20)
