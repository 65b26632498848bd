"""Batches over HTTP, with the official client where it has the call."""

from __future__ import annotations

import base64
import json
import time
from typing import Any

import httpx
import openai
import pytest

from serving.web.batch_schema import MAX_BATCH_BYTES, MAX_REQUESTS

URL, EDITS = "/v1/images/generations", "/v1/images/edits"
TIMEOUT_S = 60.0


def line(custom_id: str, **body: Any) -> dict[str, Any]:
    picture = {"prompt": "a red heart", "num_inference_steps": 1} | body
    return {"custom_id": custom_id, "method": "POST", "url": URL, "body": picture}


def as_lines(lines: list[Any]) -> bytes:
    return b"".join(json.dumps(each).encode() + b"\n" for each in lines)


def post_lines(http: httpx.Client, content: bytes) -> httpx.Response:
    return http.post("/v1/batches", content=content, headers={"content-type": "application/jsonl"})


def wait_for(client: openai.OpenAI, batch_id: str) -> Any:
    deadline_s = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline_s:
        batch = client.batches.retrieve(batch_id)
        if batch.status != "in_progress":
            return batch
        time.sleep(0.1)
    pytest.fail(f"{batch_id} is not done after {TIMEOUT_S} s")


def test_a_batch_of_lines_is_answered_line_by_line(http: httpx.Client, client: openai.OpenAI) -> None:
    """Answers keep order and names, inline or by URL, and have the pictures of direct requests."""
    lines = [line("a", seed=1), line("b", seed=2, n=2, response_format="url"), line("c", output_format="webp")]
    created = post_lines(http, as_lines(lines))
    assert created.status_code == 200, created.text
    batch = wait_for(client, created.json()["id"])
    assert (batch.status, batch.endpoint, batch.error_file_id) == ("completed", URL, None)
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (3, 3, 0)
    content = client.files.content(batch.output_file_id)
    assert content.response.headers["content-type"].startswith("application/jsonl")
    output = [json.loads(text) for text in content.text.splitlines()]
    assert [(one["custom_id"], one["response"]["status_code"], one["error"]) for one in output] == [
        (name, 200, None) for name in "abc"
    ]
    assert len({one["id"] for one in output}) == 3
    first, second, third = (one["response"]["body"]["data"] for one in output)
    alone = http.post(URL, json=lines[0]["body"]).json()["data"][0]
    assert first[0]["receipt"]["seed"] == alone["seed"] == 1
    assert [picture["seed"] for picture in second] == [2, 3]
    for picture in second:
        assert picture["b64_json"] is None and httpx.get(picture["url"]).content.startswith(b"\x89PNG")
    assert base64.b64decode(third[0]["b64_json"]).startswith(b"RIFF")
    assert batch.id in [listed.id for listed in client.batches.list(limit=100)]


def test_a_json_batch_keeps_its_metadata_and_an_idempotency_key_repeats_it(
    http: httpx.Client, client: openai.OpenAI
) -> None:
    body = {
        "endpoint": URL,
        "requests": [{"custom_id": "a", "body": {"prompt": "a cat", "num_inference_steps": 1}}],
        "metadata": {"for": "the album"},
    }
    headers = {"idempotency-key": f"batch-{time.time()}"}
    first, second = (http.post("/v1/batches", json=body, headers=headers).json() for _ in range(2))
    assert first["id"] == second["id"]
    other = http.post("/v1/batches", json=body | {"metadata": {}}, headers=headers)
    assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_key_reused")
    batch = wait_for(client, first["id"])
    assert batch.metadata == {"for": "the album"}
    assert client.batches.cancel(batch.id).status == "completed", "what has ended stays as it is"


def test_a_batch_is_cancelled(http: httpx.Client, client: openai.OpenAI) -> None:
    created = post_lines(http, as_lines([line(str(n), n=10, num_inference_steps=4) for n in range(60)])).json()
    batch = client.batches.cancel(created["id"])
    assert batch.status == "cancelled" and batch.cancelled_at is not None and batch.output_file_id is None
    deadline_s = time.monotonic() + 10
    while "tdm_live_samples 0.0" not in http.get("/metrics").text:
        assert time.monotonic() < deadline_s, "its pictures are still being made"
        time.sleep(0.05)


def test_a_batch_with_bad_lines_is_refused_and_the_lines_are_named(http: httpx.Client) -> None:
    before = http.get("/v1/batches").json()
    lines = [
        as_lines([line("a")]),
        b"\n",
        b"{broken\n",
        as_lines([line("a")]),
        as_lines([line("c", size="9x9")]),
        as_lines([line("d", stream=True)]),
        as_lines([line("e", latency_budget_ms=40)]),
        as_lines([line("f") | {"url": "/v1/embeddings"}]),
        as_lines([7]),
        as_lines([line("g", prompt="\0")]),
    ]
    answer = post_lines(http, b"".join(lines))
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "invalid_batch")
    for says in (
        "line 3: the body is not JSON",
        "line 4: custom_id 'a' appears twice",
        "line 5: size",
        "line 6: stream",
    ):
        assert says in error["message"]
    assert error["message"].endswith("and 3 more")
    assert len(error["message"]) < 2000
    assert http.get("/v1/batches").json() == before


@pytest.mark.parametrize(
    "body",
    [
        {"requests": []},
        {"requests": [{"custom_id": "a", "body": {}}]},
        {"requests": [{"custom_id": "", "body": {"prompt": "a"}}]},
        {"requests": [{"custom_id": "x" * 65, "body": {"prompt": "a"}}]},
        {"requests": [{"body": {"prompt": "a"}}]},
        {"requests": [{"custom_id": "a", "body": {"prompt": "a", "unknown": 1}}]},
        {"requests": [line(str(n)) for n in range(MAX_REQUESTS + 1)]},
        {"requests": [line("a")], "endpoint": "/v1/embeddings"},
        {"requests": [line("a")], "input_file_id": "x"},
        {"requests": "all"},
        {"requests": [line("a")], "metadata": {"a": 1}},
        [],
    ],
)
def test_a_bad_batch_is_refused(http: httpx.Client, body: Any) -> None:
    answer = http.post("/v1/batches", json=body)
    assert answer.status_code == 400, answer.text
    assert len(answer.text) < 2000


def test_a_huge_batch_is_refused(http: httpx.Client) -> None:
    assert post_lines(http, b" " * (MAX_BATCH_BYTES + 1)).status_code == 413
    assert http.post("/v1/batches", content=b"x", headers={"content-type": "text/plain"}).status_code == 415


@pytest.mark.parametrize("batch_id", ["batch_x", "..%2f..", "video_0", "x" * 2000])
def test_an_unknown_batch_is_a_404(http: httpx.Client, batch_id: str) -> None:
    for answer in (http.get(f"/v1/batches/{batch_id}"), http.post(f"/v1/batches/{batch_id}/cancel")):
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


def test_the_documented_bodies_have_the_fields_that_are_read(http: httpx.Client) -> None:
    paths = http.get("/openapi.json").json()["paths"]
    batch = paths["/v1/batches"]["post"]["requestBody"]["content"]
    assert batch["application/json"]["schema"]["required"] == ["requests"]
    assert set(batch["application/jsonl"]["schema"]["required"]) == {"custom_id", "body"}
    video = paths["/v1/videos"]["post"]["requestBody"]["content"]
    assert "seconds" in video["multipart/form-data"]["schema"]["properties"]
    assert {"/v1/files/{file_id}", "/v1/videos/{video_id}/content", "/v1/batches/{batch_id}/cancel"} <= paths.keys()


def test_a_batch_with_a_bad_picture_is_refused(http: httpx.Client) -> None:
    bad = line("a", image=base64.b64encode(b"no picture").decode()) | {"url": EDITS}
    none = line("b") | {"url": EDITS}
    message = post_lines(http, as_lines([bad, none])).json()["error"]["message"]
    assert "line 1: image is no file of PNG" in message and "line 2: image is required" in message
