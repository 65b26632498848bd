"""Settings of the server. They are frozen, and checked when they are made."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from serving.public_address import Network, parse_url
from tdm_runtime.checkpoint.file_hashes import FileHashes
from tdm_runtime.checkpoint.folder import DEFAULT_CHECKPOINT
from tdm_runtime.engine.engine import EngineConfig
from tdm_runtime.media.provenance import ProvenanceConfig
from tdm_runtime.model.artifacts import BackendConfig

FrontName = Literal["direct", "ray"]
LogFormat = Literal["text", "json"]


@dataclass(frozen=True)
class ModelSource:
    """A checkpoint to serve."""

    folder: Path = DEFAULT_CHECKPOINT
    """Folder in diffusers layout with a tdm_recipe.json."""
    name: str | None = None
    """Name in requests. None takes the name in the recipe."""


@dataclass(frozen=True)
class LoraSource:
    """A LoRA to serve as a model of its own."""

    name: str
    path: Path
    scale: float = 1.0
    """Factor of what the LoRA adds. 1 is as trained."""
    base: str | None = None
    """Name of the model that it changes. None is the first model."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise ValueError(f"the scale of {self.name} is {self.scale}; give a finite number; 1 is as trained")


def default_state_folder() -> Path:
    """Return the default folder for jobs and files, in the user's state folder."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "tdm-serve"


@dataclass(frozen=True)
class ServerConfig:
    """Settings of one server and its replicas."""

    models: tuple[ModelSource, ...] = (ModelSource(),)
    """Served checkpoints. Requests that name no model get the first."""
    loras: tuple[LoraSource, ...] = ()
    lora_folder: Path | None = None
    """Folder of LoRAs, which may be added, changed and removed while the server runs. Each is a file
    `NAME.safetensors` or a folder `NAME`; an optional `NAME.json` has its `scale` and `base`."""
    host: str = "127.0.0.1"
    """Address to listen on. Set `api_keys` if other machines can reach it."""
    port: int = 8000
    grpc_port: int | None = None
    """Port for gRPC on the same address. None turns gRPC off."""
    front: FrontName = "direct"
    """Process that answers HTTP. "direct": the replicas themselves, on one machine. "ray": Ray's proxy and an ingress,
    which are slower, reach replicas on any machine and retry a request on another replica if one dies."""
    min_replicas: int = 1
    """Number of processes with an engine. Each serves all models."""
    max_replicas: int = 1
    """Most processes with an engine. With `front="ray"`, Ray starts more than `min_replicas` when each has more open
    requests than one denoiser call takes."""
    engine: EngineConfig = EngineConfig()
    backend: BackendConfig = BackendConfig("auto", threads=0)
    """Backend of the models, and its options."""
    api_keys: Path | None = None
    """File of API keys, made by `tdm-keys`. None accepts requests without a key."""
    blocked_words: Path | None = None
    """File of words that prompts must not contain, one a line."""
    safety_checker: str | None = None
    """`MODULE:FACTORY` of a custom checker, see `tdm_runtime.safety.SafetyChecker`."""
    provenance: ProvenanceConfig = ProvenanceConfig()
    """What files and pixels say about their origin."""
    state_folder: Path = field(default_factory=default_state_folder)
    """Folder of jobs and files, unless `database_url` and `artifacts_url` name other places."""
    database_url: str | None = None
    """SQLAlchemy URL of the database of jobs. Several machines share one in PostgreSQL. None is SQLite in
    `state_folder`."""
    artifacts_url: str | None = None
    """fsspec URL of the place where files are kept. None is a folder in `state_folder`."""
    artifact_ttl_s: float = 24 * 3600.0
    """How long files and ended jobs are kept, in seconds."""
    public_url: str | None = None
    """URL of this server for its clients. None takes the address that each request was sent to, or that a trusted proxy
    states."""
    trusted_proxies: tuple[Network, ...] = ()
    """Proxies whose X-Forwarded-Proto, -Host and -Prefix, or Forwarded, are believed. Of others they are ignored."""
    max_open_requests: int = 1024
    """Most HTTP and gRPC requests open at once; more get 429. The engine has a limit of its own, `engine.max_live`."""
    request_timeout_s: float = 60.0
    """Time after which an unanswered request is cancelled and gets 504, in seconds."""
    body_timeout_s: float = 10.0
    """Time that a client has to send its body, in seconds."""
    max_body_bytes: int = 64 * 1024
    max_picture_body_bytes: int = 16 * 1024 * 1024
    """Most bytes of a request that brings pictures."""
    drain_timeout_s: float = 20.0
    """Time that accepted requests have to finish after SIGTERM, in seconds."""
    log_level: str = "warning"
    """Lowest level of the server's own messages. `info` adds a line for each request, never with its prompt."""

    log_format: LogFormat = "text"
    """Format of the log. `json` writes one object a line."""
    log_file: Path | None = None
    """File of the log. None is stderr."""
    otlp_endpoint: str | None = None
    """URL of an OpenTelemetry collector that receives traces over HTTP. None sends no traces."""
    trace_file: Path | None = None
    """File of traces as JSON lines, with or without a collector."""
    file_hashes: FileHashes = field(default_factory=FileHashes, repr=False, compare=False)
    """Hashes of checkpoint files. The command fills them; its replicas hash only files that have changed since."""

    def __post_init__(self) -> None:
        if not 1 <= self.port <= 65535:
            raise ValueError(f"port is {self.port}; it must be from 1 to 65535")
        if not 1 <= self.min_replicas <= self.max_replicas:
            raise ValueError(f"replicas are {self.min_replicas} to {self.max_replicas}; give 1 or more, smaller first")
        if self.front == "direct" and self.min_replicas < self.max_replicas:
            message = "only Ray's proxy can follow the load; give one number, or --front ray"
            raise ValueError(f"replicas are {self.min_replicas} to {self.max_replicas}; {message}")
        if self.grpc_port is not None and (not 1 <= self.grpc_port <= 65535 or self.grpc_port == self.port):
            raise ValueError(f"grpc_port is {self.grpc_port}; it must be from 1 to 65535, but not {self.port}, HTTP's")
        if not 60 <= self.artifact_ttl_s <= 366 * 24 * 3600:
            hours = self.artifact_ttl_s / 3600
            raise ValueError(f"--artifact-ttl-hours is {hours:g}; give 0.0167 (a minute) to 8784 (366 days)")
        if self.public_url is not None:
            parse_url(self.public_url)
        if self.max_open_requests < 1:
            raise ValueError(f"max_open_requests is {self.max_open_requests}; it must be at least 1")
        if self.otlp_endpoint is not None and not self.otlp_endpoint.startswith(("http://", "https://")):
            raise ValueError(f"otlp_endpoint is {self.otlp_endpoint!r}; it must be a URL such as http://127.0.0.1:4318")
