"""The server's settings: frozen, checked where they are made."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tdm_runtime.checkpoint.folder import DEFAULT_CHECKPOINT, FileHashes
from tdm_runtime.engine.engine import EngineConfig
from tdm_runtime.model.artifacts import BackendConfig

FrontName = Literal["direct", "ray"]
LogFormat = Literal["text", "json"]


@dataclass(frozen=True)
class ModelSource:
    """A checkpoint to serve."""

    folder: Path = DEFAULT_CHECKPOINT
    """In diffusers layout, with a tdm_recipe.json."""
    name: str | None = None
    """What requests call it; None is the name in its recipe."""


@dataclass(frozen=True)
class LoraSource:
    """A LoRA to serve as a model of its own."""

    name: str
    path: Path
    scale: float = 1.0
    """Times what it was trained to add."""
    base: str | None = None
    """The model that it changes; None is the first."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise ValueError(f"the scale of {self.name} is {self.scale}; give a finite number, 1 is as trained")


def default_state_folder() -> Path:
    """Where programs of this user keep what should outlive them."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "tdm-serve"


@dataclass(frozen=True)
class ServerConfig:
    """One server process and its replicas."""

    models: tuple[ModelSource, ...] = (ModelSource(),)
    """The first makes the pictures of requests that name none."""
    loras: tuple[LoraSource, ...] = ()
    lora_folder: Path | None = None
    """LoRAs that are served as they come, change and go: `NAME.safetensors` or a folder `NAME`, and where there is
    one, `NAME.json` with `scale` and `base`."""
    host: str = "127.0.0.1"
    """Address to listen on; others than this machine's own want `api_keys`."""
    port: int = 8000
    grpc_port: int | None = None
    """Of gRPC, on the same address; None is no gRPC."""
    front: FrontName = "direct"
    """Who answers HTTP: the replicas themselves, on one machine; or Ray's proxy and an ingress, which cost more, route
    between replicas on any machine and ask another where one dies."""
    min_replicas: int = 1
    """Processes with engines, each with all models."""
    max_replicas: int = 1
    """Behind Ray's proxy, more are started when there is more to do than engines take in one call."""
    engine: EngineConfig = EngineConfig()
    backend: BackendConfig = BackendConfig("auto", threads=0)
    """What runs the checkpoint."""
    api_keys: Path | None = None
    """File of who may ask, made by `tdm-keys`; None lets everybody."""
    blocked_words: Path | None = None
    """File of words that prompts may not hold, one a line."""
    safety_checker: str | None = None
    """`MODULE:FACTORY` of a checker of one's own (`serving.images.safety.SafetyChecker`)."""
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

    log_format: LogFormat = "text"
    """`json` is one object a line."""
    log_file: Path | None = None
    """In place of stderr."""
    otlp_endpoint: str | None = None
    """URL of an OpenTelemetry collector that takes traces by HTTP; None sends none."""
    trace_file: Path | None = None
    """Traces as JSON lines, with or without a collector."""
    file_hashes: FileHashes = field(default_factory=FileHashes, repr=False, compare=False)
    """Hashes of checkpoint files. The command fills them; its replicas hash only files that have changed since."""

    def __post_init__(self) -> None:
        if not 1 <= self.port <= 65535:
            raise ValueError(f"port is {self.port}; it must be from 1 to 65535")
        if not 1 <= self.min_replicas <= self.max_replicas:
            raise ValueError(f"replicas are {self.min_replicas} to {self.max_replicas}; give 1 or more, fewest first")
        if self.front == "direct" and self.min_replicas < self.max_replicas:
            message = "Ray starts more by what its proxy sees; give one number, or --front ray"
            raise ValueError(f"replicas are {self.min_replicas} to {self.max_replicas}; {message}")
        if self.grpc_port is not None and (not 1 <= self.grpc_port <= 65535 or self.grpc_port == self.port):
            raise ValueError(f"grpc_port is {self.grpc_port}; it must be from 1 to 65535, and not HTTP's {self.port}")
        if not 60 <= self.artifact_ttl_s <= 366 * 24 * 3600:
            hours = self.artifact_ttl_s / 3600
            raise ValueError(f"--artifact-ttl-hours is {hours:g}; files are kept from a minute to a year")
        if self.public_url is not None and not self.public_url.startswith(("http://", "https://")):
            raise ValueError(f"--public-url is {self.public_url[:80]!r}; it must begin with http:// or https://")
        if self.max_open_requests < 1:
            raise ValueError(f"max_open_requests is {self.max_open_requests}; it must be at least 1")
        if self.otlp_endpoint is not None and not self.otlp_endpoint.startswith(("http://", "https://")):
            raise ValueError(f"otlp_endpoint is {self.otlp_endpoint!r}; it must be a URL as http://127.0.0.1:4318")
