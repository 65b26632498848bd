"""The command line that every peer has."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from benchmarks.peers.pipelines import PEER_BACKENDS, PeerBackend
from tdm_runtime.checkpoint.folder import DEFAULT_CHECKPOINT

MISSING_DEPENDENCY = 3
"""Exit status."""


@dataclass(frozen=True)
class PeerConfig:
    """What a peer is to serve, and where."""

    port: int
    """On 127.0.0.1."""
    backend: PeerBackend
    checkpoint: Path


def parse_arguments(name: str, arguments: Sequence[str] | None = None) -> PeerConfig:
    """Read the command line; exits with status 2 on a mistake."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.peers.{name}")
    parser.add_argument("--port", type=int, required=True, help="on 127.0.0.1")
    parser.add_argument("--backend", choices=PEER_BACKENDS, required=True)
    parser.add_argument("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT, help="folder (%(default)s)")
    given = parser.parse_args(arguments)
    return PeerConfig(given.port, given.backend, given.checkpoint.resolve())


def exit_without(package: str) -> NoReturn:
    """Say what is missing."""
    print(f"{package} is not installed; `pip install {package}` in an environment of its own", file=sys.stderr)
    sys.exit(MISSING_DEPENDENCY)
