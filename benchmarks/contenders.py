"""Start and stop the servers that `tdm-bench compare` measures, one after the other."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.peers.environment import GENAI_EXTRA, PEERS_EXTRA
from benchmarks.peers.pipelines import OUR_ARGUMENTS
from benchmarks.peers.refusal import CANNOT_RUN

PEERS = {"fastapi_lock": "", "litserve_batch": PEERS_EXTRA, "ray_batch": "", "bentoml_service": PEERS_EXTRA}
"""Peer -> extra of the environment that it needs; empty for this one."""
PEER_BACKENDS = ("stock-fp32", "stock-bf16", "ours")
GENAI_PEERS = ("fastapi_lock", "litserve_batch")
"""Peers that also run with OpenVINO GenAI: GenAI makes no batches of different prompts, so others would be alike."""
OURS = "tdm-serve"
ENGINE = "engine in process"

START_TIMEOUT_S = 240.0
STOP_TIMEOUT_S = 40.0


class NotRunError(Exception):
    """Error: a contender cannot be measured here. The message says why."""


@dataclass(frozen=True)
class Contender:
    """Server that can be started from this repository."""

    name: str
    module: str
    arguments: tuple[str, ...]
    ready_route: str
    """Route that answers 200 once the server can make pictures."""
    backend: str
    """Backend the server runs: stock-fp32, stock-bf16, openvino-genai or ours."""
    extra: str = ""
    """Extra of the environment that it needs; empty for this one."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """Environment variables of its processes beside ours."""

    @property
    def is_peer(self) -> bool:
        return self.name != OURS


def all_contenders(our_arguments: Sequence[str] = (), peer_arguments: Sequence[str] = ()) -> list[Contender]:
    """Return our server, then every peer with every backend that it has. With `ours` it runs what our server runs.

    Args:
        our_arguments: command-line arguments of our server, without the port.
        peer_arguments: command-line arguments of every peer, without port and backend.
    """
    ours = Contender(OURS, "serving.command.cli", tuple(our_arguments), "/ready", "ours")
    pairs = [(name, backend, extra) for name, extra in PEERS.items() for backend in PEER_BACKENDS]
    pairs += [(name, "openvino-genai", GENAI_EXTRA) for name in GENAI_PEERS]
    peers = [
        Contender(
            f"{name} {backend}",
            f"benchmarks.peers.{name}",
            ("--backend", backend, *peer_arguments),
            "/health",
            backend,
            extra,
            {OUR_ARGUMENTS: shlex.join(our_arguments)},
        )
        for name, backend, extra in pairs
    ]
    return [ours, *peers]


@contextmanager
def running(
    contender: Contender, logs: Path, start_timeout_s: float = START_TIMEOUT_S, python: str = sys.executable
) -> Iterator[str]:
    """Start a contender, yield its base URL, and always stop it at the end.

    Args:
        logs: folder for the contender's output.
        python: interpreter of the environment that the contender needs.

    Raises:
        NotRunError: the contender ended, or was not ready in time.
    """
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / f"{contender.name.replace(' ', '-')}.log"
    port = _free_port()
    command = [python, "-m", contender.module, "--port", str(port), *contender.arguments]
    quiet = {"PYTHONUNBUFFERED": "1", "DIFFUSERS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error"}
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            env={**os.environ, **quiet, **contender.variables},
            start_new_session=True,  # Ctrl-C reaches only us; leftover child processes can be killed as a group
        )
    try:
        base_url = f"http://127.0.0.1:{port}"
        _wait_until_ready(process, base_url + contender.ready_route, log, start_timeout_s)
        yield base_url
    finally:
        _stop(process)


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path, timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        if (status := process.poll()) is not None:
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it printed nothing"]
            raise NotRunError(lines[-1] if status == CANNOT_RUN else f"it ended with {status}: {lines[-1]}")
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:  # not listening yet, or 503: not ready yet
            pass
        time.sleep(0.2)
    raise NotRunError(f"it was not ready within {timeout_s:.0f} s")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Send SIGTERM, then kill what remains of the process group."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_TIMEOUT_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
