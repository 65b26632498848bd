"""Logs and traces that a server with API keys writes about its requests."""

from __future__ import annotations

import json
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving.fronts.access import APIKey, draw_key, hash_key, save_keys
from tests.serving.conftest import RunningServer, start_server

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PROMPT = "a marker heart"
ROUTE = "/v1/images/generations"
Line = dict[str, Any]


@pytest.fixture(scope="module")
def key() -> str:
    return draw_key()


@pytest.fixture(scope="module")
def written(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, key: str) -> Iterator[Path]:
    """Folder with the log and the traces of a server, from its start to its end.

    Ray's folder names a cluster that is gone, as after a machine lost its power. The server must not wait for it.
    """
    folder = tmp_path_factory.mktemp("telemetry")
    save_keys(folder / "keys", [APIKey("tester", hash_key(key))])
    files = ("--api-keys", str(folder / "keys"), "--trace-file", str(folder / "traces"))
    model = ("--checkpoint", str(tiny_checkpoint), "--backend", "torch", "--threads", "1", "--max-batch-size", "1")
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(dir="/tmp") as short:  # sockets are there
        patch.setenv("RAY_TMPDIR", short)
        gone = Path(short, "ray", "ray_current_cluster")
        gone.parent.mkdir()
        gone.write_text("192.0.2.1:9")
        server = start_server(folder / "log", *files, *model, "--log-format", "json", "--log-level", "info")
        yield from requests_of(server, key, folder)


def requests_of(server: RunningServer, key: str, folder: Path) -> Iterator[Path]:
    """Send requests, stop the server and yield the folder."""
    with httpx.Client(base_url=server.url, timeout=60, headers={"authorization": f"Bearer {key}"}) as http:
        traced = {"traceparent": f"00-{TRACE_ID}-b7ad6b7169203331-01", "x-request-id": "request-1"}
        answer = http.post(ROUTE, json={"prompt": PROMPT, "n": 2, "num_inference_steps": 3}, headers=traced)
        assert answer.status_code == 200
        assert answer.headers["traceresponse"].startswith(f"00-{TRACE_ID}-")
        assert http.post(ROUTE, json={"prompt": PROMPT, "size": "9x9"}).status_code == 400
        assert http.post(ROUTE, json={"prompt": PROMPT, "stream": True, "partial_images": 1}).status_code == 200
        assert http.get(f"/{PROMPT}").status_code == 404
        assert http.get("/health").status_code == 200
        refused = http.post(ROUTE, json={"prompt": PROMPT}, headers={"authorization": "Bearer tdm-wrong-secret"})
        assert refused.status_code == 401
    leave(server.port, key)
    assert server.stop() == 0, server.log.read_text()[-2000:]
    yield folder


def leave(port: int, key: str) -> None:
    """Send a long request and close the connection."""
    body = json.dumps({"prompt": PROMPT, "n": 10}).encode()
    head = f"POST {ROUTE} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {key}\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(head.encode() + body)
        connection.setblocking(True)


@pytest.fixture(scope="module")
def lines(written: Path) -> list[Line]:
    """Lines of the server in the log. Ray and tools that the server starts write there too."""
    text = (written / "log").read_text().splitlines()
    return [line for line in map(json.loads, (each for each in text if each.startswith("{"))) if "logger" in line]


@pytest.fixture(scope="module")
def spans(written: Path) -> list[Line]:
    return [json.loads(line) for line in (written / "traces").read_text().splitlines()]


def test_every_line_is_an_object_with_time_level_and_message(lines: list[Line]) -> None:
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)
    assert not [line for line in lines if "(ServeReplica" in line["message"]]
    assert [line["message"].split(" ")[0] for line in lines if line["logger"] == "serving.start"][-2:] == [
        "ready:",
        "stopping:",
    ]


def test_the_line_of_a_request_has_its_status_and_error_code(lines: list[Line]) -> None:
    (made,) = [line for line in lines if line.get("request_id") == "request-1"]
    assert (made["method"], made["route"], made["status"]) == ("POST", ROUTE, 200)
    assert made["trace_id"] == TRACE_ID and made["duration_ms"] > 0
    codes = {line["status"]: line.get("code") for line in lines if line.get("route") == ROUTE}
    assert codes[200] is None and codes[400] == "invalid_value" and codes[401] == "invalid_api_key"
    assert codes[499] == "client_closed"


def test_the_span_of_a_request_has_its_stages_as_children(spans: list[Line]) -> None:
    mine = [span for span in spans if span["context"]["trace_id"] == f"0x{TRACE_ID}"]
    (root,) = [span for span in mine if span["kind"] == "SpanKind.SERVER"]
    assert root["name"] == f"POST {ROUTE}" and root["parent_id"] == "0xb7ad6b7169203331"
    assert root["attributes"] | {"tdm.backend": ""} == {
        "http.request.method": "POST",
        "http.route": ROUTE,
        "http.response.status_code": 200,
        "tdm.backend": "",
        "tdm.model": "tdm-emoji",
        "tdm.n": 2,
        "tdm.num_inference_steps": 3,
        "tdm.size": "16x16",
    }
    stages = sorted((span for span in mine if span is not root), key=lambda span: str(span["start_time"]))
    assert [span["name"] for span in stages] == ["queue", "text", "denoise", "denoise", "denoise", "decode", "encode"]
    assert {span["parent_id"] for span in stages} == {root["context"]["span_id"]}
    assert root["start_time"] <= stages[0]["start_time"] and stages[-1]["end_time"] <= root["end_time"]


def test_the_span_of_a_failed_request_has_its_error_code(spans: list[Line]) -> None:
    roots = [span["attributes"] for span in spans if span["kind"] == "SpanKind.SERVER"]
    found = {(one["http.response.status_code"], one.get("error.type")) for one in roots}
    expected = {(200, None), (400, "invalid_value"), (401, "invalid_api_key"), (404, "not_found")}
    assert found == expected | {(499, "client_closed")}
    assert not [one for one in roots if one["http.route"] == "/health"]


def test_logs_and_traces_contain_no_prompts_keys_or_pictures(written: Path, key: str) -> None:
    log, traces = (written / "log").read_text(), (written / "traces").read_text()
    log = "\n".join(line for line in log.splitlines() if f"GET '/{PROMPT}'" not in line)  # a path with the prompt
    for secret in (PROMPT, key, hash_key(key), "tdm-wrong-secret", "iVBOR"):
        assert secret not in log and secret not in traces
