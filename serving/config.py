"""The server's settings: frozen, checked where they are made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tdm_runtime.backend_choice import BackendConfig
from tdm_runtime.checkpoint import DEFAULT_CHECKPOINT
from tdm_runtime.engine import EngineConfig

FrontName = Literal["direct", "ray"]


@dataclass(frozen=True)
class ServerConfig:
    """One server process and its replica."""

    checkpoint: Path = DEFAULT_CHECKPOINT
    """Folder in diffusers layout with a tdm_recipe.json."""
    host: str = "127.0.0.1"
    """Address to listen on; others than this machine's own want `api_keys`."""
    port: int = 8000
    grpc_port: int | None = None
    """Of gRPC, on the same address; None is no gRPC."""
    front: FrontName = "direct"
    """Who answers HTTP: the replica itself, or Ray's proxy, which costs more and routes between machines."""
    engine: EngineConfig = EngineConfig()
    backend: BackendConfig = BackendConfig("auto", threads=0)
    """What runs the checkpoint."""
    api_keys: Path | None = None
    """File of who may ask, made by `tdm-keys`; None lets everybody."""
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
        if self.grpc_port is not None and (not 1 <= self.grpc_port <= 65535 or self.grpc_port == self.port):
            raise ValueError(f"grpc_port is {self.grpc_port}; it must be from 1 to 65535, and not HTTP's {self.port}")
        if self.max_open_requests < 1:
            raise ValueError(f"max_open_requests is {self.max_open_requests}; it must be at least 1")
