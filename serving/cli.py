"""`tdm-serve`: start Ray, the replica and the HTTP front on this machine."""

from __future__ import annotations

import argparse
import logging
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, get_args

from serving.access import load_keys
from serving.config import FrontName, ServerConfig
from serving.web.front import reserve
from tdm_runtime.backend_choice import TORCH_BACKENDS, Artifacts, BackendConfig
from tdm_runtime.checkpoint import DEFAULT_CHECKPOINT, Checkpoint, open_checkpoint
from tdm_runtime.cli import add_backend_arguments, backend_config
from tdm_runtime.engine import EngineConfig
from tdm_runtime.errors import ArtifactError, TDMError

USAGE_ERROR = 2
NO_PORT = 65536
"""One more than there are."""


def parse_arguments(arguments: list[str] | None = None) -> ServerConfig:
    """Read the command line; exits with status 2 on a mistake."""
    defaults, engine = ServerConfig(), EngineConfig()
    parser = argparse.ArgumentParser(prog="tdm-serve", description="Serve a few-step diffusion checkpoint over HTTP.")
    parser.add_argument("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT, help="checkpoint folder (%(default)s)")
    parser.add_argument("--host", default=defaults.host, help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=defaults.port, help="(%(default)s)")
    parser.add_argument(
        "--front",
        choices=get_args(FrontName),
        default=defaults.front,
        help="who answers HTTP: the replica, or Ray's proxy: slower, finds replicas on any machine (%(default)s)",
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
    given = parser.parse_args(arguments)
    try:
        return ServerConfig(
            checkpoint=given.checkpoint.resolve(),
            host=given.host,
            port=given.port,
            front=given.front,
            api_keys=given.api_keys and given.api_keys.resolve(),
            state_folder=given.state_folder.resolve(),
            database_url=given.database_url,
            artifacts_url=given.artifacts_url,
            artifact_ttl_s=given.artifact_ttl_hours * 3600,
            public_url=given.public_url and given.public_url.rstrip("/"),
            max_open_requests=given.max_open_requests,
            engine=EngineConfig(
                max_batch_size=given.max_batch_size,
                max_live=given.max_live,
                result_cache_bytes=given.result_cache_mb * 2**20,
            ),
            backend=backend_config(given),
            log_level=given.log_level,
        )
    except ValueError as error:
        parser.error(str(error))


def main(arguments: list[str] | None = None) -> int:
    """Run the server until SIGINT or SIGTERM. Returns the exit status."""
    config = parse_arguments(arguments)
    try:
        checkpoint = open_checkpoint(config.checkpoint)
        if config.api_keys is not None:
            load_keys(config.api_keys)
        check_state(config)
        address = reserve_address(config.host, config.port)
        check_artifacts(checkpoint, config.backend)
    except (TDMError, OSError, ValueError) as error:
        print(f"tdm-serve: {error}", file=sys.stderr)
        return USAGE_ERROR
    with address:
        return serve_until_signalled(config)


def reserve_address(host: str, port: int) -> socket.socket:
    """Hold the address for this server as long as the returned socket is open.

    Raises:
        OSError: naming the address and what to do.
    """
    try:
        return reserve(host, port)
    except OSError as error:
        raise OSError(f"cannot listen on {host}:{port} ({error.strerror}); choose another with --port") from None


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
    print(f"building {checkpoint.recipe.name} for this machine, once (--backend torch does without)", flush=True)
    command = [sys.executable, "-m", "export.cli", str(checkpoint.folder)]
    if config.backend != "auto":
        command += ["--backend", config.backend]
    if config.precision is not None:
        command += ["--precision", config.precision]
    if subprocess.run(command, stdout=subprocess.DEVNULL, cwd=Path(__file__).resolve().parent.parent).returncode == 0:
        return
    if config.backend != "auto" and not config.allow_fallback:
        raise ArtifactError("the artifacts could not be built, see above; --allow-fallback serves with torch")
    print("the artifacts could not be built, see above; serving with torch", flush=True)


def prepare_environment() -> None:
    """What Ray reads when it is imported, here and in its own processes.

    Nothing is reported home. Ray's internal ports listen on every interface, so they want a token
    that only this server's processes know. Its three pages of statistics listen there without one, so
    they stay off: the server has its own. Two of them are off only where their port is none.
    """
    os.environ |= {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
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

    from serving.deployment import QUIET, build_application

    print(f"starting {config.checkpoint.name} on {config.host}:{config.port}", flush=True)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    ray.init(include_dashboard=False, logging_level=logging.WARNING, log_to_driver=True)
    # After Ray, which takes the signals for itself when it starts.
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    try:
        serve.start(**proxy_options(config), logging_config=QUIET)
        serve.run(build_application(config), name="images", route_prefix="/")
        print(f"backend: {serve.get_app_handle('images').backend.remote().result()}", flush=True)
        print(f"ready: http://{config.host}:{config.port} (playground), /v1/images/generations (API)", flush=True)
        stop.wait()
        print("stopping: accepted requests finish, then the server exits", flush=True)
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
