"""The HTTP front: with a small application, for cases that need a slow answer, and on real servers."""

from __future__ import annotations

import asyncio
import http.client
import socket
from collections.abc import Awaitable, Callable

import psutil
import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.command.cli import main
from serving.fronts.address import bind, reserve
from serving.web import http_front as front
from serving.web.http_front import HTTPFront
from tests.serving.conftest import RunningServer, free_port
from tests.serving.killing import processes

MAX_MESSAGE_BYTES = 2**20
HEAD = b"POST / HTTP/1.1\r\nHost: a\r\n"


# -- with a small application ----------------------------------------------------------------------

Client = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def converse(app: ASGIApp, client: Client) -> None:
    """Serve an application for as long as one client talks to it."""

    async def run() -> None:
        port = free_port()
        started = await HTTPFront.start(app, "127.0.0.1", port, MAX_MESSAGE_BYTES)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        async with asyncio.timeout(20):
            await client(reader, writer)
            writer.close()
            await started.close()
        assert not started.is_running

    asyncio.run(run())


async def read_body(receive: Receive) -> None:
    while (await receive()).get("more_body", False):
        pass


async def start_answer(send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})


async def end_answer(send: Send) -> None:
    await send({"type": "http.response.body", "body": b"end"})


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    await read_body(receive)
    await start_answer(send)
    await end_answer(send)


def test_a_client_that_leaves_cancels_the_application() -> None:
    cancelled, waiting = asyncio.Event(), asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await read_body(receive)
        waiting.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + b"Content-Length: 2\r\n\r\nab")
        await waiting.wait()
        writer.close()
        await cancelled.wait()

    converse(app, client)


def test_work_after_an_answer_is_not_cancelled() -> None:
    """After its answer, the application sees a disconnect, as from a client that left."""
    finished = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await echo(scope, receive, send)
        await asyncio.sleep(0.1)
        assert (await receive())["type"] == "http.disconnect"
        finished.set()

    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(2):
            finished.clear()
            writer.write(HEAD + b"Content-Length: 2\r\n\r\nab")
            await reader.readuntil(b"0\r\n\r\n")
            await finished.wait()

    converse(app, client)


def test_each_part_of_a_stream_is_sent_at_once() -> None:
    seen = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await read_body(receive)
        await start_answer(send)
        await send({"type": "http.response.body", "body": b"data: first\n\n", "more_body": True})
        await seen.wait()
        await end_answer(send)

    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + b"Content-Length: 0\r\n\r\n")
        await reader.readuntil(b"data: first")
        seen.set()
        await reader.readuntil(b"end")

    converse(app, client)


def test_closing_waits_for_open_answers_and_refuses_new_connections() -> None:
    async def run() -> None:
        waiting, go_on = asyncio.Event(), asyncio.Event()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await read_body(receive)
            waiting.set()
            await go_on.wait()
            await start_answer(send)
            await end_answer(send)

        port = free_port()
        started = await HTTPFront.start(app, "127.0.0.1", port, MAX_MESSAGE_BYTES)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(HEAD + b"Content-Length: 0\r\n\r\n")
        await waiting.wait()
        closing = asyncio.create_task(started.close())
        await asyncio.sleep(0.4)
        assert not closing.done()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", port)
        go_on.set()
        assert b"end" in await reader.read()
        await closing
        writer.close()

    asyncio.run(run())


def test_a_connection_whose_head_never_ends_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "HEAD_TIMEOUT_S", 0.2)

    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD)
        assert await reader.read() == b""

    converse(echo, client)


@pytest.mark.parametrize(
    ("head", "filler"),
    [
        (HEAD + b"X-Big: ", b"x" * 1000),
        (HEAD, b"X-One-Of-Many: x\r\n" * 50),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\nX-Trailer: ", b"x" * 1000),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1;" + b"x" * 1000 + b"\r\na\r\n"),
    ],
    ids=["one header", "many headers", "trailer", "chunk extensions"],
)
def test_the_size_of_a_request_without_its_body_is_limited(head: bytes, filler: bytes) -> None:
    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(head)
        with pytest.raises(ConnectionError):  # the front stops reading and closes
            for _ in range(4 * front.MAX_OVERHEAD_BYTES // len(filler)):
                writer.write(filler)
                await writer.drain()
                await asyncio.sleep(0.001)

    converse(echo, client)


def test_the_body_does_not_count_as_part_of_the_head() -> None:
    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(2):
            writer.write(HEAD + b"Content-Length: 1000000\r\n\r\n" + b"x" * 1_000_000)
            assert (await reader.readuntil(b"0\r\n\r\n")).startswith(b"HTTP/1.1 200")

    converse(echo, client)


@pytest.mark.parametrize(
    ("sent", "returned"),
    [(b"abc-123", b"abc-123"), (b"", None), (None, None), (b"\xe4", None), (b"x" * 300, None)],
    ids=["usable", "empty", "absent", "not ASCII", "too long"],
)
def test_an_answer_has_one_request_id(sent: bytes | None, returned: bytes | None) -> None:
    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        header = b"" if sent is None else b"X-Request-ID: " + sent + b"\r\n"
        writer.write(HEAD + header + b"Content-Length: 0\r\n\r\n")
        answer = (await reader.readuntil(b"\r\n\r\n")).lower()
        (line,) = (line for line in answer.split(b"\r\n") if line.startswith(b"x-request-id:"))
        given = line.split(b":")[1].strip()
        assert given == returned if returned else len(given) == 36

    converse(echo, client)


def test_an_address_is_reserved_for_one_server_and_all_its_replicas() -> None:
    port = free_port()
    with reserve("127.0.0.1", port):
        with pytest.raises(OSError):
            reserve("127.0.0.1", port)
        for _ in range(2):  # the second time, the kernel still has connections of the first
            with bind("127.0.0.1", port) as replica, bind("127.0.0.1", port) as other:
                replica.listen()
                with pytest.raises(OSError):
                    reserve("127.0.0.1", port)
                connection = socket.create_connection(("127.0.0.1", port))
                replica.accept()[0].close()
                connection.close()
                other.listen()
    reserve("127.0.0.1", port).close()


# -- on real servers -------------------------------------------------------------------------------


def answers_without_token(host: str, port: int) -> bool:
    """Return whether a plain GET gets a page."""
    connection = http.client.HTTPConnection(host, port, timeout=5)
    try:
        connection.request("GET", "/metrics")
        return connection.getresponse().status < 400
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def test_a_second_server_on_the_same_port_is_refused(server: RunningServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--port", str(server.port)]) == 2
    assert f"127.0.0.1:{server.port}" in capsys.readouterr().err


def test_only_the_front_answers_without_a_token(server: RunningServer) -> None:
    """Ray's internal ports need the server's token, over HTTP and over gRPC."""
    listening = {c.laddr for p in processes(server) for c in p.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    assert {address.ip for address in listening if address.port == server.port} == {"127.0.0.1"}
    loopback = {"0.0.0.0": "127.0.0.1", "::": "::1"}
    answering = {a.port for a in listening if answers_without_token(loopback.get(a.ip, a.ip), a.port)}
    assert answering == {server.port}
