"""The server's settings: frozen, checked where they are made."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tdm_runtime.backend_choice import BackendConfig
from tdm_runtime.checkpoint import DEFAULT_CHECKPOINT
from tdm_runtime.engine import EngineConfig

FrontName = Literal["direct", "ray"]


def default_state_folder() -> Path:
    """Where programs of this user keep what should outlive them."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "tdm-serve"


@dataclass(frozen=True)
class ServerConfig:
    """One server process and its replica."""

    checkpoint: Path = DEFAULT_CHECKPOINT
    """Folder in diffusers layout with a tdm_recipe.json."""
    host: str = "127.0.0.1"
    """Address to listen on; others than this machine's own want `api_keys`."""
    port: int = 8000
    front: FrontName = "direct"
    """Who answers HTTP: the replica itself, or Ray's proxy, which costs more and routes between machines."""
    engine: EngineConfig = EngineConfig()
    backend: BackendConfig = BackendConfig("auto", threads=0)
    """What runs the checkpoint."""
    api_keys: Path | None = None
    """File of who may ask, made by `tdm-keys`; None lets everybody."""
    state_folder: Path = field(default_factory=default_state_folder)
    """What outlives the server: jobs and files, where the two below do not say otherwise."""
    database_url: str | None = None
    """Of jobs, as SQLAlchemy reads it; several machines share one in PostgreSQL. SQLite in `state_folder` else."""
    artifacts_url: str | None = None
    """Where files are kept, as fsspec reads it; a folder in `state_folder` else."""
    artifact_ttl_s: float = 24 * 3600.0
    """Files, and jobs that ended, are kept for so long."""
    public_url: str | None = None
    """What clients call this server, without a path; what they called it by in their request else."""
    max_open_requests: int = 1024
    """HTTP and gRPC requests open at once; beyond, 429. What of them the engine takes is its own to say."""
    request_timeout_s: float = 60.0
    """A request that is not answered by then is cancelled and gets 504."""
    body_timeout_s: float = 10.0
    """Time a client has to send its body."""
    max_body_bytes: int = 64 * 1024
    drain_timeout_s: float = 20.0
    """On SIGTERM, time for accepted requests to finish."""
    log_level: str = "warning"
    """Of the server's own messages; `info` adds a line a request, never with its prompt."""

    def __post_init__(self) -> None:
        if not 1 <= self.port <= 65535:
            raise ValueError(f"port is {self.port}; it must be from 1 to 65535")
        if not 60 <= self.artifact_ttl_s <= 366 * 24 * 3600:
            hours = self.artifact_ttl_s / 3600
            raise ValueError(f"--artifact-ttl-hours is {hours:g}; files are kept from a minute to a year")
        if self.public_url is not None and not self.public_url.startswith(("http://", "https://")):
            raise ValueError(f"--public-url is {self.public_url[:80]!r}; it must begin with http:// or https://")
        if self.max_open_requests < 1:
            raise ValueError(f"max_open_requests is {self.max_open_requests}; it must be at least 1")
