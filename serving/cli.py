"""`tdm-serve`: start Ray, the replica and the HTTP front on this machine."""

from __future__ import annotations

import argparse
import logging
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, get_args

from serving.access import load_keys
from serving.config import FrontName, LogFormat, LoraSource, ModelSource, ServerConfig
from serving.logs import set_up_logging, start_logger
from serving.safety import Safety
from serving.web.front import reserve
from tdm_runtime.backend_choice import TORCH_BACKENDS, Artifacts, BackendConfig
from tdm_runtime.checkpoint import DEFAULT_CHECKPOINT, Checkpoint, open_checkpoint
from tdm_runtime.cli import add_backend_arguments, backend_config
from tdm_runtime.engine import EngineConfig
from tdm_runtime.errors import ArtifactError, CheckpointError, TDMError
from tdm_runtime.lora import read_lora

USAGE_ERROR = 2
NO_PORT = 65536
"""One more than there are."""


def parse_arguments(arguments: list[str] | None = None) -> ServerConfig:
    """Read the command line; exits with status 2 on a mistake."""
    defaults, engine = ServerConfig(), EngineConfig()
    parser = argparse.ArgumentParser(prog="tdm-serve", description="Serve a few-step diffusion checkpoint over HTTP.")
    models = parser.add_mutually_exclusive_group()
    models.add_argument("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT, help="checkpoint folder (%(default)s)")
    models.add_argument(
        "--model",
        action="append",
        default=[],
        type=model_source,
        metavar="NAME=FOLDER",
        help="a checkpoint and what requests call it; may be given several times, the first is the default",
    )
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        type=lora_source,
        metavar="NAME=PATH[:SCALE][@MODEL]",
        help="a LoRA in the manner of diffusers, kohya or PEFT, and what requests call it; may be given several times",
    )
    parser.add_argument(
        "--lora-folder", type=Path, help="folder of LoRAs that are served as they come, change and go, by their names"
    )
    parser.add_argument("--host", default=defaults.host, help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=defaults.port, help="(%(default)s)")
    parser.add_argument("--grpc-port", type=int, help="answer gRPC there as well; without it, only HTTP")
    parser.add_argument(
        "--front",
        choices=get_args(FrontName),
        default=defaults.front,
        help="who answers HTTP: the replica, or Ray's proxy: slower, finds replicas on any machine (%(default)s)",
    )
    parser.add_argument(
        "--replicas",
        type=replica_range,
        default=(1, 1),
        metavar="N or N-M",
        help="processes with engines; a range, with --front ray, follows the load (1)",
    )
    parser.add_argument(
        "--max-batch-size", type=int, default=engine.max_batch_size, help="pictures in one denoiser call (%(default)s)"
    )
    parser.add_argument(
        "--max-live", type=int, default=engine.max_live, help="pictures accepted and unanswered (%(default)s)"
    )
    parser.add_argument(
        "--result-cache-mb",
        type=int,
        default=engine.result_cache_bytes // 2**20,
        help="MiB of finished pictures kept for who asks for exactly the same again (%(default)s)",
    )
    parser.add_argument(
        "--api-keys", type=Path, help="file of API keys, made by `tdm-keys add`; without it, everybody may ask"
    )
    parser.add_argument("--blocked-words", type=Path, help="file of words that prompts may not hold, one a line")
    parser.add_argument(
        "--safety-checker", metavar="MODULE:FACTORY", help="what checks prompts and pictures, see docs/security.md"
    )
    parser.add_argument(
        "--state-folder", type=Path, default=defaults.state_folder, help="of jobs and kept files (%(default)s)"
    )
    parser.add_argument("--database-url", help="of jobs, as postgresql+psycopg://...; SQLite in the state folder else")
    parser.add_argument("--artifacts-url", help="of kept files, as s3://bucket/folder; in the state folder else")
    parser.add_argument(
        "--artifact-ttl-hours",
        type=float,
        default=defaults.artifact_ttl_s / 3600,
        help="how long files and ended jobs are kept (%(default)s)",
    )
    parser.add_argument("--public-url", help="what clients call this server, as https://images.example.org")
    parser.add_argument(
        "--max-open-requests",
        type=int,
        default=defaults.max_open_requests,
        help="requests open at once; more are refused (%(default)s)",
    )
    add_backend_arguments(parser)
    parser.add_argument(
        "--log-level", choices=["info", "warning", "error"], default=defaults.log_level, help="(%(default)s)"
    )
    add_telemetry_arguments(parser)
    given = parser.parse_args(arguments)
    try:
        return ServerConfig(
            models=tuple(given.model) or (ModelSource(given.checkpoint.resolve()),),
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
            max_open_requests=given.max_open_requests,
            blocked_words=given.blocked_words and given.blocked_words.resolve(),
            safety_checker=given.safety_checker,
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


def add_telemetry_arguments(parser: argparse.ArgumentParser) -> None:
    """Where logs and traces go."""
    parser.add_argument(
        "--log-format", choices=get_args(LogFormat), default="text", help="json is one object a line (%(default)s)"
    )
    parser.add_argument("--log-file", type=Path, help="in place of stderr")
    parser.add_argument(
        "--otlp-endpoint",
        metavar="URL",
        default=os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT"),
        help="OpenTelemetry collector that takes traces by HTTP, as http://127.0.0.1:4318; none by default, or "
        "OTEL_EXPORTER_OTLP_ENDPOINT",
    )
    parser.add_argument("--trace-file", type=Path, metavar="FILE", help="write traces as JSON lines, too")


def main(arguments: list[str] | None = None) -> int:
    """Run the server until SIGINT or SIGTERM. Returns the exit status."""
    config = parse_arguments(arguments)
    try:
        set_up_logging(config)
        if config.trace_file is not None:
            config.trace_file.open("a").close()  # better refused here than in the replica
        checkpoints = check_models(config)
        if config.api_keys is not None:
            load_keys(config.api_keys)
        Safety.load(config)
        check_state(config)
        addresses = reserve_addresses(config)
        for checkpoint in checkpoints:
            check_artifacts(checkpoint, config.backend)
    except (TDMError, OSError, ValueError) as error:
        print(f"tdm-serve: {error}", file=sys.stderr)
        return USAGE_ERROR
    with addresses:
        return serve_until_signalled(config)


def model_source(text: str) -> ModelSource:
    """Read NAME=FOLDER."""
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FOLDER")
    return ModelSource(Path(folder).resolve(), name)


def lora_source(text: str) -> LoraSource:
    """Read NAME=PATH[:SCALE][@MODEL]."""
    found = re.fullmatch(r"(?P<name>[^=]+)=(?P<path>.+?)(?::(?P<scale>[-+.\deE]+))?(?:@(?P<base>[^@/]+))?", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH[:SCALE][@MODEL]")
    try:
        return LoraSource(found["name"], Path(found["path"]).resolve(), float(found["scale"] or 1), found["base"])
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def replica_range(text: str) -> tuple[int, int]:
    """Read N or N-M."""
    if re.fullmatch(r"\d{1,3}(-\d{1,3})?", text, re.ASCII) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor a range as 1-4")
    fewest, _, most = text.partition("-")
    return int(fewest), int(most or fewest)


def check_models(config: ServerConfig) -> list[Checkpoint]:
    """Open what is to be served, so that a mistake is said before anything is started.

    Raises:
        CheckpointError: a checkpoint or a LoRA cannot be served, or two have one name.
    """
    checkpoints = [open_checkpoint(source.folder) for source in config.models]
    opened = zip(config.models, checkpoints, strict=True)
    names = [source.name or checkpoint.recipe.name for source, checkpoint in opened]
    bases = list(names)
    for lora in config.loras:
        read_lora(lora.path)
        names.append(lora.name)
        if lora.base is not None and lora.base not in bases:
            raise CheckpointError(f"the base of {lora.name} is {lora.base!r}; this server has {', '.join(bases)}")
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise CheckpointError(f"two models are called {doubled[0]!r}; give each a name of its own")
    if len(bases) > 1 and config.backend.artifacts is not None:
        raise CheckpointError("--artifacts is of one checkpoint; leave it out, each has a folder of its own by default")
    if config.lora_folder is not None and not config.lora_folder.is_dir():
        raise CheckpointError(f"--lora-folder {config.lora_folder} is not a folder; make it, or leave it out")
    return checkpoints


def reserve_addresses(config: ServerConfig) -> ExitStack:
    """Hold the addresses for this server until the returned stack is closed.

    Raises:
        OSError: naming the address and what to do.
    """
    with ExitStack() as held:
        for port, flag in ((config.port, "--port"), (config.grpc_port, "--grpc-port")):
            try:
                if port is not None:
                    held.enter_context(reserve(config.host, port))
            except OSError as error:
                message = f"cannot listen on {config.host}:{port} ({error.strerror}); choose another with {flag}"
                raise OSError(message) from None
        return held.pop_all()


def check_state(config: ServerConfig) -> None:
    """Refuse a database or a place for files that cannot be used.

    Raises:
        ValueError, OSError: naming what is wrong.
    """
    from serving.artifacts import open_artifacts
    from serving.jobs.service import open_store

    open_artifacts(config)
    open_store(config).close()


def check_artifacts(checkpoint: Checkpoint, config: BackendConfig) -> None:
    """Refuse artifacts that cannot be used; build those of the default folder where there are none.

    Raises:
        ArtifactError: the artifacts are of another checkpoint or machine; or they could not be built.
    """
    try:
        artifacts = Artifacts.find(checkpoint, config)
        if not artifacts.is_missing(config):
            if config.backend != "auto" and config.backend not in TORCH_BACKENDS:
                artifacts.require(config.backend, config.precision)
            return
    except ArtifactError:
        if config.allow_fallback:
            return  # what the replica runs in their place, and why, is said when it has loaded
        raise
    start_logger.info("building %s for this machine, once (--backend torch does without)", checkpoint.recipe.name)
    command = [sys.executable, "-m", "export.cli", str(checkpoint.folder)]
    if config.backend != "auto":
        command += ["--backend", config.backend]
    if config.precision is not None:
        command += ["--precision", config.precision]
    if subprocess.run(command, stdout=subprocess.DEVNULL, cwd=Path(__file__).resolve().parent.parent).returncode == 0:
        return
    if config.backend != "auto" and not config.allow_fallback:
        raise ArtifactError("the artifacts could not be built, see above; --allow-fallback serves with torch")
    start_logger.warning("the artifacts could not be built, see above; serving with torch")


def prepare_environment() -> None:
    """What Ray reads when it is imported, here and in its own processes.

    Nothing is reported home. Ray's internal ports listen on every interface, so they want a token
    that only this server's processes know. Its three pages of statistics listen there without one, so
    they stay off: the server has its own. Two of them are off only where their port is none.
    """
    os.environ |= {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
        "RAY_DISABLE_WORKER_LOG_PREFIX": "1",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_enable_metrics_collection": "0",
        "AUTOSCALER_METRIC_PORT": str(NO_PORT),
        "DASHBOARD_METRIC_PORT": str(NO_PORT),
    }


def reason_of(error: Exception) -> str:
    """What went wrong in the replica, without Ray's account of how it came to know."""
    causes = re.findall(r"tdm_runtime\.errors\.\w+: (.+)", str(error))
    return causes[-1] if causes else str(error)


def drain(config: ServerConfig) -> None:
    """Let the replica answer what it accepted, for at most `drain_timeout_s`."""
    from ray import serve

    try:
        serve.get_app_handle("images").drain.remote().result(timeout_s=config.drain_timeout_s)
        if config.front == "ray":
            time.sleep(0.2)  # the last answers are still on their way through Ray's proxy
    except TimeoutError:
        print(f"tdm-serve: requests ran for more than {config.drain_timeout_s:g} s and are lost", file=sys.stderr)


def proxy_options(config: ServerConfig) -> dict[str, Any]:
    """Where Ray's own proxy listens: nowhere, unless it is the front."""
    if config.front == "direct":
        return {"proxy_location": "Disabled"}
    return {"http_options": {"host": config.host, "port": config.port}}


def serve_until_signalled(config: ServerConfig) -> int:
    """Start everything, wait for SIGINT or SIGTERM, let accepted requests finish."""
    prepare_environment()
    import ray
    from ray import serve

    from serving.deployment import build_application, ray_logging

    names = ", ".join(source.name or source.folder.name for source in config.models)
    start_logger.info("starting %s on %s:%d", names, config.host, config.port)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    ray.init(include_dashboard=False, logging_level=logging.WARNING, log_to_driver=True)
    # After Ray, which takes the signals for itself when it starts.
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    try:
        serve.start(**proxy_options(config), logging_config=ray_logging(config.log_format))
        serve.run(build_application(config), name="images", route_prefix="/")
        start_logger.info("backend: %s", serve.get_app_handle("images").backend.remote().result())
        if config.grpc_port is not None:
            start_logger.info("grpc: %s:%d", config.host, config.grpc_port)
        url = f"http://{config.host}:{config.port}"
        start_logger.info("ready: %s (playground), /v1/images/generations (API)", url)
        stop.wait()
        start_logger.info("stopping: accepted requests finish, then the server exits")
        drain(config)
    except Exception as error:
        print(f"tdm-serve: the server could not start: {reason_of(error)}", file=sys.stderr)
        return USAGE_ERROR
    finally:
        serve.shutdown()
        ray.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
