"""The resources for KServe fit its classes and the server that they start."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from serving.command.arguments import parse_arguments
from tests.serving.conftest import RunningServer

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "kserve"
RUNTIME, SERVICE = FOLDER / "clusterservingruntime.yaml", FOLDER / "inferenceservice.yaml"
KSERVE = ROOT / "build" / "kserve" / "bin" / "python"
CHECK = Path(__file__).with_name("kserve_schema.py")


def read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(file.read_text())
    return found


@pytest.fixture
def container() -> dict[str, Any]:
    (only,) = read(RUNTIME)["spec"]["containers"]
    assert only["name"] == "kserve-container"
    return dict(only)


@pytest.mark.skipif(not KSERVE.is_file(), reason="no KServe classes; `make build/kserve/.installed` installs them")
def test_kserves_classes_have_every_field_of_the_resources(tmp_path: Path) -> None:
    runtime = read(RUNTIME)
    spec = runtime["spec"]
    spec["supportedModelFormats"][0]["autoselect"] = True
    spec["containers"][0]["ports"][0]["containerPort"] = "8080"
    spec["containers"][0]["readinessProbe"]["http"] = {}
    del spec["containers"][0]["name"]
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(yaml.safe_dump(runtime))
    command = [str(KSERVE), str(CHECK), str(RUNTIME), str(SERVICE), str(wrong)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(found.partition(": ")[0] for found in json.loads(done.stdout)) == [
        "wrong.yaml.spec.containers[0].name",
        "wrong.yaml.spec.containers[0].ports.0.containerPort",
        "wrong.yaml.spec.containers[0].readinessProbe.http",
        "wrong.yaml.spec.supportedModelFormats[0].autoselect is unknown",
    ]


def test_the_container_starts_a_server_on_its_ports(container: dict[str, Any]) -> None:
    assert container["command"] == ["tdm-serve"]
    config = parse_arguments([argument.replace("{{.Name}}", "lightning") for argument in container["args"]])
    (model,) = config.models
    assert (model.name, str(model.folder)) == ("lightning", "/mnt/models")
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http1": config.port, "h2c": config.grpc_port}
    assert config.host == "0.0.0.0"
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    assert str(config.state_folder.parent) in mounts
    assert read(RUNTIME)["spec"]["annotations"]["prometheus.kserve.io/port"] == str(config.port)


def test_probes_and_metrics_ask_what_the_server_answers(container: dict[str, Any], tdm_server: RunningServer) -> None:
    probes = [container[name]["httpGet"] for name in ("startupProbe", "readinessProbe", "livenessProbe")]
    paths = {probe["path"] for probe in probes}
    assert paths == {"/v2/health/live", "/v2/health/ready"}
    assert {probe["port"] for probe in probes} == {container["ports"][0]["containerPort"]}
    for path in (*paths, read(RUNTIME)["spec"]["annotations"]["prometheus.kserve.io/path"]):
        assert httpx.get(f"{tdm_server.url}{path}").status_code == 200


def test_the_example_takes_the_runtime() -> None:
    runtime, model = read(RUNTIME), read(SERVICE)["spec"]["predictor"]["model"]
    assert model["runtime"] == runtime["metadata"]["name"]
    assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]
    assert model["modelFormat"]["name"] in {known["name"] for known in runtime["spec"]["supportedModelFormats"]}
