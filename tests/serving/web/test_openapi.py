"""The OpenAPI document is complete and true: schemathesis sends valid and invalid requests."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import httpx

from tests.serving.conftest import RunningServer

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "response_headers_conformance",
    "unsupported_method",
    "negative_data_rejection",
    "missing_required_header",
    "ignored_auth",
    "use_after_free",
)
"""All but those that make no sense: sizes and step counts are the model's, so allowed data may be refused;
a clip that was made is listed before it has content."""


def test_schemathesis_finds_nothing(server: RunningServer, tmp_path: Path) -> None:
    address = f"{server.url}/openapi.json"
    options = ["--max-examples", "10", "--seed", "6", "--checks", ",".join(CHECKS), "--no-color"]
    command = [sys.executable, "-m", "schemathesis.cli", "run", address, *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    selected = len([0 for operations in httpx.get(address).json()["paths"].values() for _ in operations])
    assert re.search(rf"Tested: {selected}$", done.stdout, re.MULTILINE), done.stdout[-2000:]


def test_every_operation_is_documented(server: RunningServer) -> None:
    """Each operation has a description, its errors and, where it reads one, its body."""
    for path, operations in httpx.get(f"{server.url}/openapi.json").json()["paths"].items():
        for method, operation in operations.items():
            assert operation["description"].endswith("."), (method, path)
            assert "ErrorBody" in str(operation["responses"]["default"]), (method, path)
            is_create = method == "post" and ("{" not in path or path.endswith("/infer"))
            assert ("requestBody" in operation) == is_create, (method, path)
