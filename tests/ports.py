"""Ports for servers that a test starts."""

from __future__ import annotations

import random
import socket

RANGE = range(20_000, 32_768)
"""Above the ports of Ray's workers and below those that Linux gives to connections and to port 0."""


def free_port() -> int:
    """Draw a port that was free a moment ago.

    The kernel and Ray hand out no port of this range, so a port stays free until the server under test takes it.
    """
    for port in random.SystemRandom().sample(RANGE, 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError(f"100 ports of {RANGE.start} to {RANGE.stop - 1} are in use; stop the servers that hold them")
