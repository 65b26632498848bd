"""The command line of `tdm-serve`."""

from __future__ import annotations

import argparse
import ipaddress
import os
import re
from pathlib import Path
from typing import get_args

from serving.config import FrontName, LogFormat, LoraSource, ModelSource, ServerConfig
from serving.public_address import Network
from tdm_runtime.checkpoint.folder import CLIP_CHECKPOINT, DEFAULT_CHECKPOINT
from tdm_runtime.cli import add_backend_arguments, add_provenance_arguments, backend_config, provenance_config
from tdm_runtime.engine.engine import EngineConfig


def parse_arguments(arguments: list[str] | None = None) -> ServerConfig:
    """Read the command line. Exits with status 2 on a mistake."""
    parser = argparse.ArgumentParser(prog="tdm-serve", description="Serve a few-step diffusion checkpoint over HTTP.")
    add_model_arguments(parser)
    parser.add_argument(
        "--lora-folder", type=Path, help="folder of LoRAs, served by name; files may change while the server runs"
    )
    add_front_arguments(parser)
    add_service_arguments(parser)
    add_provenance_arguments(parser)
    add_backend_arguments(parser)
    parser.add_argument(
        "--log-level", choices=["info", "warning", "error"], default=ServerConfig.log_level, help="(%(default)s)"
    )
    add_telemetry_arguments(parser)
    given = parser.parse_args(arguments)
    embedded = (DEFAULT_CHECKPOINT,) if given.artifacts else (DEFAULT_CHECKPOINT, CLIP_CHECKPOINT)
    try:
        return ServerConfig(
            models=model_sources(given, *embedded),
            loras=tuple(given.lora),
            lora_folder=given.lora_folder and given.lora_folder.resolve(),
            host=given.host,
            port=given.port,
            grpc_port=given.grpc_port,
            front=given.front,
            min_replicas=given.replicas[0],
            max_replicas=given.replicas[1],
            api_keys=given.api_keys and given.api_keys.resolve(),
            state_folder=given.state_folder.resolve(),
            database_url=given.database_url,
            artifacts_url=given.artifacts_url,
            artifact_ttl_s=given.artifact_ttl_hours * 3600,
            public_url=given.public_url and given.public_url.rstrip("/"),
            trusted_proxies=given.trusted_proxies,
            max_open_requests=given.max_open_requests,
            blocked_words=given.blocked_words and given.blocked_words.resolve(),
            safety_checker=given.safety_checker,
            provenance=provenance_config(given),
            engine=EngineConfig(
                max_batch_size=given.max_batch_size,
                max_live=given.max_live,
                result_cache_bytes=given.result_cache_mb * 2**20,
            ),
            backend=backend_config(given),
            log_level=given.log_level,
            log_format=given.log_format,
            log_file=given.log_file and given.log_file.resolve(),
            otlp_endpoint=given.otlp_endpoint or None,
            trace_file=given.trace_file and given.trace_file.resolve(),
        )
    except ValueError as error:
        parser.error(str(error))


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of checkpoints and LoRAs. `model_sources` reads those of checkpoints."""
    models = parser.add_mutually_exclusive_group()
    models.add_argument("--checkpoint", type=Path, help="checkpoint folder (default: the embedded checkpoint)")
    models.add_argument(
        "--model",
        action="append",
        default=[],
        type=model_source,
        metavar="NAME=FOLDER",
        help="a checkpoint and its name in requests; may be given several times, the first is the default",
    )
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        type=lora_source,
        metavar="NAME=PATH[:SCALE][@MODEL]",
        help="a LoRA in the format of diffusers, kohya or PEFT, and its name in requests; may be given several times",
    )


def model_sources(given: argparse.Namespace, *embedded: Path) -> tuple[ModelSource, ...]:
    """Return the checkpoints that were named, or else the embedded ones."""
    folders = (given.checkpoint,) if given.checkpoint else embedded
    return tuple(given.model) or tuple(ModelSource(folder.resolve()) for folder in folders)


def add_front_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of addresses, replicas and load."""
    defaults, engine = ServerConfig(), EngineConfig()
    parser.add_argument("--host", default=defaults.host, help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=defaults.port, help="(%(default)s)")
    parser.add_argument("--grpc-port", type=int, help="port for gRPC; without it, the server has no gRPC")
    parser.add_argument(
        "--front",
        choices=get_args(FrontName),
        default=defaults.front,
        help="what answers HTTP: direct is the replica; ray is Ray's proxy, slower, for several machines (%(default)s)",
    )
    parser.add_argument(
        "--replicas",
        type=replica_range,
        default=(1, 1),
        metavar="N or N-M",
        help="processes with an engine; with --front ray, a range follows the load (1)",
    )
    parser.add_argument(
        "--max-batch-size", type=int, default=engine.max_batch_size, help="pictures per denoiser call (%(default)s)"
    )
    parser.add_argument(
        "--max-live", type=int, default=engine.max_live, help="most pictures in work or waiting (%(default)s)"
    )
    parser.add_argument(
        "--result-cache-mb",
        type=int,
        default=engine.result_cache_bytes // 2**20,
        help="MiB of finished pictures kept for requests that are exactly repeated (%(default)s)",
    )


def add_service_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of access, safety, and the storage of jobs and files."""
    defaults = ServerConfig()
    parser.add_argument(
        "--api-keys", type=Path, help="file of API keys, made by `tdm-keys add`; without it, requests need no key"
    )
    parser.add_argument("--blocked-words", type=Path, help="file of words that prompts must not contain, one a line")
    parser.add_argument(
        "--safety-checker", metavar="MODULE:FACTORY", help="checker of prompts and pictures, see docs/security.md"
    )
    parser.add_argument(
        "--state-folder", type=Path, default=defaults.state_folder, help="folder of jobs and kept files (%(default)s)"
    )
    parser.add_argument(
        "--database-url", help="database of jobs, such as postgresql+psycopg://...; by default SQLite in --state-folder"
    )
    parser.add_argument(
        "--artifacts-url", help="place of kept files, such as s3://bucket/folder; by default in --state-folder"
    )
    parser.add_argument(
        "--artifact-ttl-hours",
        type=float,
        default=defaults.artifact_ttl_s / 3600,
        help="how long files and ended jobs are kept (%(default)s)",
    )
    parser.add_argument(
        "--public-url",
        help="URL of this server for clients, such as https://example.org/pictures, whatever proxies say",
    )
    parser.add_argument(
        "--trusted-proxies",
        type=networks,
        default=defaults.trusted_proxies,
        metavar="ADDRESS[,ADDRESS]",
        help="addresses or networks of proxies whose X-Forwarded-Proto, -Host and -Prefix headers are believed",
    )
    parser.add_argument(
        "--max-open-requests",
        type=int,
        default=defaults.max_open_requests,
        help="most requests open at once; more are refused (%(default)s)",
    )


def add_telemetry_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of logs and traces."""
    parser.add_argument(
        "--log-format", choices=get_args(LogFormat), default="text", help="json writes one object a line (%(default)s)"
    )
    parser.add_argument("--log-file", type=Path, help="file of the log; stderr by default")
    parser.add_argument(
        "--otlp-endpoint",
        metavar="URL",
        default=os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT"),
        help="OpenTelemetry collector that receives traces over HTTP, such as http://127.0.0.1:4318; "
        "OTEL_EXPORTER_OTLP_ENDPOINT by default",
    )
    parser.add_argument("--trace-file", type=Path, metavar="FILE", help="file of traces as JSON lines")


def model_source(text: str) -> ModelSource:
    """Read NAME=FOLDER."""
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FOLDER")
    return ModelSource(Path(folder).resolve(), name)


def lora_source(text: str) -> LoraSource:
    """Read NAME=PATH[:SCALE][@MODEL]."""
    name, _, rest = text.partition("=")
    found = re.fullmatch(r"(?P<path>.+?)(?::(?P<scale>[-+.\deE]+))?", rest)
    if not name or found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH[:SCALE][@MODEL]")
    base = None
    if not Path(found["path"]).exists():  # a path may have an @
        named = re.fullmatch(r"(?P<path>.+?)(?::(?P<scale>[-+.\deE]+))?@(?P<base>[^@/]+)", rest)
        found, base = (found, None) if named is None else (named, named["base"])
    try:
        return LoraSource(name, Path(found["path"]).resolve(), float(found["scale"] or 1), base)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def networks(text: str) -> tuple[Network, ...]:
    """Read addresses and networks, separated by commas."""
    found = []
    for part in text.split(","):
        try:
            found.append(ipaddress.ip_network(part.strip()))
        except ValueError as error:
            message = f"{part.strip()!r} is neither an address nor a network such as 10.0.0.0/8 ({error})"
            raise argparse.ArgumentTypeError(message) from None
    return tuple(found)


def replica_range(text: str) -> tuple[int, int]:
    """Read N or N-M."""
    if re.fullmatch(r"\d{1,3}(-\d{1,3})?", text, re.ASCII) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor a range such as 1-4")
    fewest, _, most = text.partition("-")
    return int(fewest), int(most or fewest)
