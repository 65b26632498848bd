"""A real server: `tdm-serve` as a user starts it, on a free port."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest

from tests.ports import free_port

START_TIMEOUT_S = 240


@dataclass(frozen=True)
class RunningServer:
    """A `tdm-serve` process that is ready."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path
    grpc_port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def stop(self) -> int:
        """Send SIGTERM and wait. Returns the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=90)


def start_server(log: Path, *arguments: str) -> RunningServer:
    """Start a server and wait until it is ready. Its state folder is beside the log, unless the arguments change it."""
    port, grpc_port = free_port(), free_port()
    ports = ["--port", str(port), "--grpc-port", str(grpc_port)]
    state = ["--state-folder", str(log.parent / "state")]
    command = [sys.executable, "-m", "serving.command.cli", *ports, *state, *arguments]
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    server = RunningServer(process, port, log, grpc_port)
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            pytest.fail(f"tdm-serve ended with {process.returncode}:\n{log.read_text()[-2000:]}")
        try:
            with urllib.request.urlopen(f"{server.url}/ready", timeout=5) as answer:
                if answer.status == 200 and b"ready: http" in log.read_bytes():
                    return server
        except OSError:
            time.sleep(0.3)
    process.kill()
    pytest.fail(f"tdm-serve was not ready within {START_TIMEOUT_S} s:\n{log.read_text()[-2000:]}")


def wait_until(condition: Callable[[], object]) -> None:
    """Wait until a condition holds, for half a minute at most."""
    deadline_s = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline_s, "it does not come about"
        time.sleep(0.02)


@pytest.fixture(scope="session")
def server(tdm_server: RunningServer) -> RunningServer:
    """The server that all tests of the session share."""
    return tdm_server


@pytest.fixture
def http(server: RunningServer) -> Iterator[httpx.Client]:
    """HTTP client of the shared server."""
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    """OpenAI's client of the shared server. It checks every answer against OpenAI's schema."""
    url = f"{server.url}/v1"
    with openai.OpenAI(base_url=url, api_key="unused", max_retries=0, _strict_response_validation=True) as client:
        yield client
