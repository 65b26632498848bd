"""Command line shared by all peers."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.pipelines import PEER_BACKENDS, PeerBackend
from tdm_runtime.checkpoint.folder import DEFAULT_CHECKPOINT


@dataclass(frozen=True)
class PeerConfig:
    """Settings of a peer."""

    port: int
    """Port on 127.0.0.1."""
    backend: PeerBackend
    checkpoint: Path


def parse_arguments(name: str, arguments: Sequence[str] | None = None) -> PeerConfig:
    """Read the command line. Exits with status 2 on an error."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.peers.{name}")
    parser.add_argument("--port", type=int, required=True, help="port on 127.0.0.1")
    parser.add_argument("--backend", choices=PEER_BACKENDS, required=True)
    parser.add_argument("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT, help="checkpoint folder (%(default)s)")
    given = parser.parse_args(arguments)
    return PeerConfig(given.port, given.backend, given.checkpoint.resolve())
