"""The RayService file is accepted and built by Ray Serve."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from serving import deployment
from serving.command.cli import prepare_environment
from serving.config import ServerConfig

FILE = Path(__file__).resolve().parents[2] / "deploy" / "rayservice.yaml"


@pytest.fixture(scope="module")
def spec() -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load(FILE.read_text())
    assert (read["apiVersion"], read["kind"]) == ("ray.io/v1", "RayService")
    spec: dict[str, Any] = read["spec"]
    return spec


def test_ray_accepts_the_configuration(spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[ServerConfig] = []
    monkeypatch.setattr(deployment, "build_application", built.append)
    schema = ServeDeploySchema.model_validate(yaml.safe_load(spec["serveConfigV2"]))
    (application,) = schema.applications
    assert application.import_path == "serving.deployment:app"
    deployment.app(application.args)
    (config,) = built
    assert config.front == "ray"
    assert (config.min_replicas, config.max_replicas) == (1, 4)
    assert config.api_keys is not None  # the server is reachable from other machines
    assert schema.http_options.request_timeout_s > config.request_timeout_s  # the server's own timeout comes first


def test_each_worker_has_a_core_for_one_replica(spec: dict[str, Any]) -> None:
    cluster = spec["rayClusterConfig"]
    (workers,) = cluster["workerGroupSpecs"]
    assert workers["rayStartParams"]["num-cpus"] == "1"
    assert (workers["minReplicas"], workers["maxReplicas"]) == (1, 4)
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    import ray

    assert cluster["rayVersion"] == ray.__version__


def test_rays_proxy_is_configured_as_by_the_command(spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {})
    prepare_environment()
    (container,) = spec["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"]
    given = {variable["name"]: variable["value"] for variable in container["env"]}
    assert given["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"] == os.environ["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"]
