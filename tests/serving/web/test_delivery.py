"""Latency budgets, automatic step counts, streams and receipts over HTTP."""

from __future__ import annotations

import base64
import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from tdm_runtime.cli import main as tdm_generate
from tests.serving.conftest import RunningServer

PROMPT = "a red heart"
LONG_MS = 60_000.0
"""A latency budget that any machine can meet."""


def ask(http: httpx.Client, **fields: Any) -> httpx.Response:
    return http.post("/v1/images/generations", json={"prompt": PROMPT, "seed": 7} | fields)


def pixels_of(b64_json: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64_json))).convert("RGB"))


def events_of(answer: httpx.Response) -> list[tuple[str, dict[str, Any]]]:
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = []
    for block in answer.text.strip().split("\n\n"):
        name, data = block.split("\n")
        events.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return events


def test_auto_reports_the_number_of_steps_it_took(http: httpx.Client) -> None:
    answer = ask(http, num_inference_steps="auto", latency_budget_ms=LONG_MS).json()
    steps = answer["data"][0]["num_inference_steps"]
    assert 1 <= steps <= 4 and len(answer["timings"]["steps_ms"]) == steps
    assert answer["latency_budget_kept"] is True
    assert 0 < answer["predicted_ms"] < LONG_MS
    same = ask(http, num_inference_steps=steps).json()
    assert same["latency_budget_kept"] is None
    np.testing.assert_allclose(
        pixels_of(same["data"][0]["b64_json"]).astype(int),
        pixels_of(answer["data"][0]["b64_json"]).astype(int),
        atol=2,
    )


def test_auto_takes_at_least_min_inference_steps(http: httpx.Client) -> None:
    answer = ask(http, num_inference_steps="auto", min_inference_steps=3).json()
    assert answer["data"][0]["num_inference_steps"] in (3, 4)


def test_an_impossible_budget_is_the_clients_error(http: httpx.Client) -> None:
    answer = ask(http, latency_budget_ms=0.01)
    error = answer.json()["error"]
    assert answer.status_code == 400 and answer.headers["x-should-retry"] == "false"
    assert (error["param"], error["code"]) == ("latency_budget_ms", "latency_budget_too_small")
    assert "ms for 1 picture of 4 steps; raise the budget to at least" in error["message"]


def test_under_load_budgets_are_met_or_refused_with_a_retry_time(http: httpx.Client) -> None:
    """Of sixteen requests with a budget for about four, each is answered in time or refused at once.

    On a busy machine all sixteen may fit, or none; then they try again.
    """

    def with_budget(seed: int, budget_ms: float) -> httpx.Response:
        return ask(http, seed=seed, latency_budget_ms=budget_ms)

    answers: list[httpx.Response] = []
    with ThreadPoolExecutor(16) as pool:
        for num_rounds in range(1, 21):
            budget_ms = 4 * ask(http, latency_budget_ms=LONG_MS).json()["predicted_ms"]
            answers += pool.map(with_budget, range(16), [budget_ms] * 16)
            if num_rounds >= 3 and {200, 429} <= {answer.status_code for answer in answers}:
                break
    assert {answer.status_code for answer in answers} == {200, 429}
    for answer in answers:
        if answer.status_code == 429:
            assert answer.json()["error"]["code"] == "latency_budget_unavailable"
            assert int(answer.headers["retry-after-ms"]) >= 1
            assert "retry later or raise the budget" in answer.json()["error"]["message"]
        else:
            assert answer.json()["latency_budget_kept"] in (True, False)


def test_the_official_client_streams_a_draft_and_previews(client: openai.OpenAI, http: httpx.Client) -> None:
    stream = client.images.generate(
        prompt=PROMPT, stream=True, partial_images=3, extra_body={"seed": 7, "num_inference_steps": 4, "draft": True}
    )
    events: list[Any] = list(stream)
    assert [event.type for event in events] == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    assert [event.partial_image_index for event in events[:-1]] == [0, 1, 2]
    draft = ask(http, num_inference_steps=1).json()["data"][0]
    final = ask(http, num_inference_steps=4).json()["data"][0]
    for event, expected in ((events[0], draft), (events[-1], final)):
        away = pixels_of(event.b64_json).astype(int) - pixels_of(expected["b64_json"])
        assert np.abs(away).max() <= 2
    assert np.abs(pixels_of(events[0].b64_json).astype(int) - pixels_of(events[-1].b64_json)).max() > 2
    assert events[-1].usage.total_tokens > 0


def test_events_report_their_steps_and_kind(http: httpx.Client) -> None:
    events = events_of(ask(http, stream=True, partial_images=3, num_inference_steps=3))
    partial = [data for name, data in events if name == "image_generation.partial_image"]
    assert [data["num_steps_taken"] for data in partial] == [1, 2], "the last step is the picture"
    assert not any(data["is_draft"] for data in partial)
    name, completed = events[-1]
    assert name == "image_generation.completed"
    assert completed["receipt"]["seed"] == completed["seed"] == 7
    assert completed["num_inference_steps"] == 3 and completed["timings"]["total_ms"] > 0


def test_a_stream_without_partial_images_is_one_event(http: httpx.Client) -> None:
    assert [name for name, _ in events_of(ask(http, stream=True))] == ["image_generation.completed"]


def test_a_bad_request_is_refused_before_the_stream_begins(http: httpx.Client) -> None:
    answer = ask(http, stream=True, size="1024x1024")
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "size"


def test_a_client_that_leaves_a_stream_does_not_disturb_others(server: RunningServer, http: httpx.Client) -> None:
    body = {"prompt": PROMPT, "stream": True, "partial_images": 3}
    for _ in range(3):
        with httpx.stream("POST", f"{server.url}/v1/images/generations", json=body, timeout=60) as answer:
            assert next(answer.iter_lines()) == "event: image_generation.partial_image"
    assert ask(http).status_code == 200


@pytest.mark.parametrize("form", ["answer", "picture"])
def test_a_receipt_is_reproduced_by_the_command(
    http: httpx.Client, artifacts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    answer = ask(http, strict=True, num_inference_steps=2)
    file = tmp_path / form
    if form == "picture":
        file.write_bytes(base64.b64decode(answer.json()["data"][0]["b64_json"]))
    else:
        file.write_text(answer.text)
    assert tdm_generate(["--verify", str(file)]) == 0
    assert "seed 7, 2 steps" in capsys.readouterr().out


def test_without_metadata_a_picture_contains_no_receipt(http: httpx.Client) -> None:
    image = ask(http, metadata=False).json()["data"][0]
    assert b"tdm_receipt" not in base64.b64decode(image["b64_json"])
    assert image["receipt"]["prompt"] == PROMPT, "who asked knows it anyway"
