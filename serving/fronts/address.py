"""Addresses that fronts listen on. The command reserves them once, and every replica binds them."""

from __future__ import annotations

import socket


def reserve(host: str, port: int) -> socket.socket:
    """Reserve an address for this server's replicas, without listening.

    While the returned socket is open, `bind` by the same user succeeds and `reserve` by another server fails, even
    before the first replica listens and while a dead one is replaced. The socket options change only after the
    address is taken, because with them the kernel would let two servers share it.

    Raises:
        OSError: another process has the address.
    """
    held = _open(host, port, share=False)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    return held


def bind(host: str, port: int) -> socket.socket:
    """Bind a replica to the address. Other replicas of the server may be bound to it too.

    Raises:
        OSError: another server has the address.
    """
    return _open(host, port, share=True)


def _open(host: str, port: int, share: bool) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns off Nagle's algorithm only for sockets that name their protocol. With it answers take 40 ms longer.
    opened = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of a dead replica linger for a minute
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, share)
    try:
        opened.bind((host, port))
    except BaseException:
        opened.close()
        raise
    return opened
