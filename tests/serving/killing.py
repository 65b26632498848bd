"""Kills processes of a running server with SIGKILL, and checks that it recovers."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable

import httpx
import psutil

from tests.serving.conftest import RunningServer

PICTURE = {"prompt": "a cat", "num_inference_steps": 1}
RECOVERY_S = 120


def make_picture(server: RunningServer, headers: dict[str, str]) -> int:
    address = f"{server.url}/v1/images/generations"
    return httpx.post(address, json=PICTURE, headers=headers, timeout=60).status_code


def processes(server: RunningServer) -> list[psutil.Process]:
    root = psutil.Process(server.process.pid)
    return [root, *root.children(recursive=True)]


def kill(server: RunningServer, name: str) -> int:
    """Kill the server's processes whose name begins with `name`; "" kills all. Returns the number of processes."""
    found = [process for process in processes(server) if process.name().startswith(name)]
    for process in found:
        process.send_signal(signal.SIGKILL)
    return len(found)


def check_recovery(
    server: RunningServer, name: str, headers: dict[str, str], before: Callable[[], None] = lambda: None
) -> None:
    """Kill a process under load. Requests in flight may fail, none hangs, and the server answers again.

    Args:
        before: Called under load, just before the kill.
    """
    stop, outcomes = threading.Event(), list[int | str]()

    def ask() -> None:
        while not stop.is_set():
            try:
                outcomes.append(make_picture(server, headers))
            except httpx.TransportError as error:
                outcomes.append(type(error).__name__)
                time.sleep(0.1)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    begun_s = time.monotonic()
    while outcomes.count(200) < 3 and time.monotonic() - begun_s < RECOVERY_S:
        time.sleep(0.1)
    before()
    assert kill(server, name) == 1
    killed_s = time.monotonic()
    time.sleep(0.5)
    num_before = outcomes.count(200)
    while outcomes.count(200) <= num_before and time.monotonic() - killed_s < RECOVERY_S:
        time.sleep(0.1)
    stop.set()
    for thread in threads:
        thread.join(timeout=10)
        assert not thread.is_alive(), "a request hangs"
    assert outcomes.count(200) > num_before > 0
    assert set(outcomes) <= {200, "ConnectError", "ReadError", "RemoteProtocolError"}
    assert httpx.get(f"{server.url}/ready").status_code == 200
