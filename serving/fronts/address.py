"""The addresses that fronts listen on: reserved once, bound by every replica."""

from __future__ import annotations

import socket


def reserve(host: str, port: int) -> socket.socket:
    """Hold an address for this server's replicas, without listening.

    While the returned socket is open, `bind` of the same user succeeds and `reserve` of another server does
    not: not even before the first replica listens, nor while a dead one is being replaced. The options are
    changed after the address was taken: before, the kernel would let two servers share it.

    Raises:
        OSError: another process has the address.
    """
    held = _open(host, port, share=False)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    return held


def bind(host: str, port: int) -> socket.socket:
    """Take the address beside its other replicas: those that stop, and those that share the load.

    Raises:
        OSError: another server has the address.
    """
    return _open(host, port, share=True)


def _open(host: str, port: int, share: bool) -> socket.socket:
    opened = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of a dead replica linger for a minute
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, share)
    try:
        opened.bind((host, port))
    except BaseException:
        opened.close()
        raise
    return opened
