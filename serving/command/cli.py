"""`tdm-serve`: starts Ray, the replicas and the fronts on this machine."""

from __future__ import annotations

import logging
import os
import re
import secrets
import signal
import sys
import threading
import time
from typing import Any

from serving.command.arguments import parse_arguments
from serving.command.checks import check
from serving.config import ServerConfig
from serving.telemetry.logs import set_up_logging, start_logger, write_whole_lines
from tdm_runtime.errors import TDMError

USAGE_ERROR = 2
NO_PORT = 65536
"""One above the highest port."""


def main(arguments: list[str] | None = None) -> int:
    """Run the server until SIGINT or SIGTERM. Returns the exit status."""
    config = parse_arguments(arguments)
    try:
        set_up_logging(config)
        addresses = check(config)
    except (TDMError, OSError, ValueError) as error:
        print(f"tdm-serve: {error}", file=sys.stderr)
        return USAGE_ERROR
    with addresses:
        return serve_until_signalled(config)


def prepare_environment() -> None:
    """Set the environment variables that Ray reads when it is imported, here and in its own processes.

    They turn Ray's usage statistics off. Ray's internal ports listen on every interface, so they need a token that
    only this server's processes know. Its three pages of statistics would listen there without a token, so they are
    off; the server has its own. Two of them are off only with a port that does not exist. Without a setting, Ray
    would run the replica at the priority of a batch job (nice 15), behind all other programs of the machine. Ray's
    controller looks at its replicas twice a second: ten times, as it would, cost a thirtieth of a core.
    """
    os.environ |= {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
        "RAY_DISABLE_WORKER_LOG_PREFIX": "1",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_enable_metrics_collection": "0",
        "RAY_worker_niceness": "0",
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
        "AUTOSCALER_METRIC_PORT": str(NO_PORT),
        "DASHBOARD_METRIC_PORT": str(NO_PORT),
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serving.web.http_front.configure_ray_proxy",
    }


def reason_of(error: Exception) -> str:
    """Return what went wrong in the replica, without the text that Ray puts around it."""
    causes = re.findall(r"tdm_runtime\.errors\.\w+: (.+)", str(error))
    return causes[-1] if causes else str(error)


def drain(config: ServerConfig) -> None:
    """Let the replica answer accepted requests, for at most `drain_timeout_s`."""
    from ray import serve

    try:
        serve.get_app_handle("images").drain.remote().result(timeout_s=config.drain_timeout_s)
        if config.front == "ray":
            time.sleep(0.2)  # the last answers are still on their way through Ray's proxy
    except TimeoutError:
        print(f"tdm-serve: requests ran for more than {config.drain_timeout_s:g} s and are lost", file=sys.stderr)


def proxy_options(config: ServerConfig) -> dict[str, Any]:
    """Return the settings of Ray's own proxy. It listens only if it is the front."""
    if config.front == "direct":
        return {"proxy_location": "Disabled"}
    return {"http_options": {"host": config.host, "port": config.port}}


def serve_until_signalled(config: ServerConfig) -> int:
    """Start the server, wait for SIGINT or SIGTERM, and let accepted requests finish. Returns the exit status."""
    write_whole_lines()
    set_up_logging(config)
    prepare_environment()
    import ray
    from ray import serve

    from serving.deployment import build_application, ray_logging

    names = ", ".join(source.name or source.folder.name for source in config.models)
    start_logger.info("starting %s on %s:%d", names, config.host, config.port)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    ray.init(
        os.environ.get("RAY_ADDRESS", "local"),  # without an address Ray joins a cluster that may be gone
        include_dashboard=False,
        logging_level=logging.WARNING,
        log_to_driver=True,
    )
    # Ray sets its own handlers when it starts, so these come after.
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
