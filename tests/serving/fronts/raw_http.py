"""HTTP/1.1 packet by packet: requests that offer another protocol, and the answers that they must get."""

from __future__ import annotations

import http.client
import itertools
import json
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

TIMEOUT_S = 10.0
PAUSE_S = 0.05
"""Time between two packets, so that the server reads the first alone. Between single bytes it is a hundredth."""

OFFERS = {
    "h2c": b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n",
    "websocket": b"Connection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n",
    "foo": b"connection: upgrade\r\nupgrade: foo\r\n",
    "several": b"Connection: keep-alive, uPgRaDe ,x-other\r\nUpgrade: foo/2, h2c\r\nUPGRADE: websocket\r\n",
}
"""Headers that offer a protocol; the first is what Java's client and `curl --http2` send."""
H2C = OFFERS["h2c"]
FRAMINGS = ("length", "chunked")
DELIVERIES = ("one packet", "two packets", "byte by byte")

PICTURES = "/v1/images/generations"
LAST = b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
"""A request after which the server closes the connection, so that every answer before has been seen."""

Outcome = tuple[int, int | None]
"""Status of an answer; seed of the picture in it."""


@dataclass(frozen=True)
class Conversation:
    """Packets that a client sends on one connection, and the answers that it must get until the server closes it."""

    name: str
    packets: list[bytes]
    expected: list[Outcome]

    def hold(self, port: int) -> list[Outcome | str]:
        """Run it with a server on this machine. Returns the answers, and the error if the connection broke."""
        answers = list[Outcome | str]()
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S) as connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for packet in self.packets:
                    connection.sendall(packet)
                    time.sleep(PAUSE_S if len(packet) > 1 else PAUSE_S / 100)
                with connection.makefile("rb") as stream:
                    answers.extend(read_answers(stream))
        except OSError as error:
            answers.append(repr(error))
        return answers


def read_answers(stream: BinaryIO) -> Iterator[Outcome]:
    """Read responses until the connection ends."""
    while line := stream.readline():
        headers = http.client.parse_headers(stream)
        body = b""
        if headers["transfer-encoding"] == "chunked":
            while size := int(stream.readline(), 16):
                body += stream.read(size)
                stream.readline()
            stream.readline()
        else:
            body = stream.read(int(headers["content-length"] or 0))
        yield int(line.split()[1]), json.loads(body)["data"][0]["seed"] if b'"seed"' in body else None


def post(headers: bytes, seed: int, framing: str = "length", path: str = PICTURES) -> tuple[bytes, bytes]:
    """Return the head and the body of a request for one picture, as they are sent."""
    body = json.dumps({"prompt": "a cat", "seed": seed, "num_inference_steps": 1}).encode()
    if framing == "chunked":
        headers += b"Transfer-Encoding: chunked\r\n"
        body = b"5\r\n%b\r\n%x\r\n%b\r\n0\r\nUpgrade: h2c\r\n\r\n" % (body[:5], len(body) - 5, body[5:])
    else:
        headers += b"Content-Length: %d\r\n" % len(body)
    return f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n".encode() + headers + b"\r\n", body


def packets(head: bytes, rest: bytes, delivery: str) -> list[bytes]:
    """Split what a client sends."""
    if delivery == "byte by byte":
        return [bytes([byte]) for byte in head + rest]
    return [head, rest] if delivery == "two packets" else [head + rest]


def conversations() -> list[Conversation]:
    """Return every offer in every framing and delivery, each with a request after it, and then special cases."""
    found = list[Conversation]()
    for (offer, headers), framing, delivery in itertools.product(OFFERS.items(), FRAMINGS, DELIVERIES):
        head, body = post(headers, len(found), framing)
        name = f"{offer}, {framing}, {delivery}"
        expected = [(200, len(found)), (200, None)]
        found.append(Conversation(name, packets(head, body + LAST, delivery), expected))

    first, second = (b"".join(post(H2C, seed, framing)) for seed, framing in ((50, "length"), (51, "chunked")))
    plain = b"".join(post(b"", 52))
    pipeline: list[Outcome] = [(200, 50), (200, 51), (200, 52), (200, None)]
    found.append(Conversation("several in one packet", [first + second + plain + LAST], pipeline))

    head, body = post(H2C + b"Expect: 100-continue\r\n", 53)
    continued: list[Outcome] = [(100, None), (200, 53), (200, None)]
    found.append(Conversation("100-continue", [head, body + LAST], continued))

    head, body = post(H2C.replace(b"Upgrade,", b"close, Upgrade,"), 54)
    found.append(Conversation("connection that closes", [head, body], [(200, 54)]))

    get = b"GET /health HTTP/1.1\r\nHost: a\r\n" + H2C + b"\r\n"
    found.append(Conversation("no body", [get + get, LAST], [(200, None)] * 3))

    for delivery in ("one packet", "two packets"):
        head, body = post(H2C, 55, path="/nowhere")
        found.append(
            Conversation(f"unknown path, {delivery}", packets(head, body + LAST, delivery), [(404, None), (200, None)])
        )

    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0"
    found.append(Conversation("prior knowledge", [preface], [(400, None)]))

    hidden = b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"
    connect = b"CONNECT / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(hidden)
    found.append(Conversation("tunnel", [connect + hidden], [(400, None)]))
    return found
