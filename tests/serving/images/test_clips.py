"""Models that make clips, asked over HTTP as a user would, and in a browser."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from tdm_runtime.cli import main as tdm_generate
from tdm_runtime.media.video_file import read_frames
from tdm_runtime.model.choice import load_model
from tdm_runtime.params import SamplingParams
from tdm_runtime.pipeline import generate
from tests.serving.images.conftest import Served
from tests.serving.web.test_playground import CHROMIUM, FLAGS

PROMPT = "a red fox runs"
GENERATIONS = "/v1/videos/generations"
CLIP = {"prompt": PROMPT, "seed": 7, "num_inference_steps": 2}
TOLERANCE = 2
"""Levels of 255 by which clips may differ that were made in batches of other sizes."""


def clip_of(http: httpx.Client, **fields: Any) -> dict[str, Any]:
    answer = http.post(GENERATIONS, json=CLIP | fields)
    assert answer.status_code == 200, answer.text
    content: dict[str, Any] = answer.json()
    return content


@pytest.mark.parametrize(
    ("model", "extra", "frames", "fps"),
    [("wan", {}, 9, 16), ("animatediff", {"num_frames": 5}, 5, 8), ("wan", {"seconds": "1"}, 17, 16)],
)
def test_the_official_client_makes_a_clip_that_can_be_made_again(
    served: Served, client: openai.OpenAI, tmp_path: Path, model: str, extra: dict[str, Any], frames: int, fps: int
) -> None:
    loose = client.with_options()
    loose._strict_response_validation = False  # the schema lists the sizes and seconds of OpenAI's models
    video: Any = loose.videos.create_and_poll(prompt=PROMPT, model=model, extra_body=CLIP | extra)  # type: ignore[call-overload]
    assert (video.status, video.progress, video.motion) == ("completed", 100, "model")
    assert (video.num_frames, video.fps, video.seconds) == (frames, fps, "1")
    clip = loose.videos.download_content(video.id).read()
    assert len(list(read_frames(clip))) == frames
    (tmp_path / "clip.mp4").write_bytes(clip)
    assert tdm_generate(["--verify", str(tmp_path / "clip.mp4"), "--checkpoint", str(served.folders[model])]) == 0
    sheet = Image.open(io.BytesIO(loose.videos.download_content(video.id, variant="spritesheet").read()))
    assert sheet.size == tuple(4 * int(side) for side in video.size.split("x"))


def test_a_clip_has_the_frames_of_the_library(served: Served, http: httpx.Client) -> None:
    answer = clip_of(http, model="wan", output_format="webp", size="32x64")
    model = load_model(served.folders["wan"], device="cpu")
    wanted = generate(model, SamplingParams(PROMPT, 7, 2, 32, 64, frames=9))
    shown = np.stack(list(read_frames(base64.b64decode(answer["data"][0]["b64_json"]))))
    assert np.abs(shown.astype(int) - wanted).max() <= TOLERANCE
    assert (answer["num_frames"], answer["size"], len(answer["timings"]["steps_ms"])) == (9, "32x64", 2)


def test_a_clip_is_a_file_a_url_or_json(served: Served, http: httpx.Client, tmp_path: Path) -> None:
    for name in ("mp4", "webm"):
        answer = http.post(GENERATIONS, json=CLIP | {"model": "wan"}, headers={"accept": f"video/{name}"})
        assert (answer.headers["content-type"], answer.headers["x-tdm-seed"]) == (f"video/{name}", "7")
        assert len(list(read_frames(answer.content))) == 9
    (tmp_path / "clip").write_bytes(answer.content)
    assert tdm_generate(["--verify", str(tmp_path / "clip"), "--checkpoint", str(served.folders["wan"])]) == 0
    url = clip_of(http, model="wan", response_format="url")["data"][0]["url"]
    assert http.get(url).headers["content-type"] == "video/mp4"
    answer = http.post(GENERATIONS, json=CLIP | {"model": "wan", "stream": True}, headers={"accept": "video/mp4"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "stream")


def test_a_stream_shows_first_frames_and_then_the_clip(http: httpx.Client) -> None:
    body = CLIP | {"model": "animatediff", "num_inference_steps": 4, "stream": True, "partial_images": 3}
    text = http.post(GENERATIONS, json=body).text
    events = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]
    assert [event["type"].rpartition(".")[2] for event in events] == ["partial_image"] * 3 + ["completed"]
    assert [event["num_steps_taken"] for event in events[:-1]] == [1, 2, 3]
    assert Image.open(io.BytesIO(base64.b64decode(events[0]["b64_json"]))).size == (64, 64)
    assert len(list(read_frames(base64.b64decode(events[-1]["b64_json"])))) == events[-1]["num_frames"] == 16


def test_a_batch_mixes_pictures_and_clips(http: httpx.Client, client: openai.OpenAI) -> None:
    """Each line is answered as a request to its url is."""
    clip = CLIP | {"model": "wan", "output_format": "webp", "strict": True}
    lines = [
        {"custom_id": "clip", "url": GENERATIONS, "body": clip},
        {"custom_id": "picture", "url": "/v1/images/generations", "body": {"prompt": PROMPT, "model": "lcm"}},
        {"custom_id": "file", "body": clip | {"response_format": "url", "num_frames": 5}},
    ]
    wrong = http.post("/v1/batches", json={"requests": [lines[0] | {"url": "/v1/images/generations"}]})
    assert "which makes clips; send the request to /v1/videos/generations" in wrong.json()["error"]["message"]
    batch: Any = http.post("/v1/batches", json={"endpoint": GENERATIONS, "requests": lines}).json()
    while batch["status"] == "in_progress":
        batch = http.get(f"/v1/batches/{batch['id']}").json()
    assert (batch["endpoint"], batch["request_counts"]["completed"]) == (GENERATIONS, 3)
    output = client.files.content(batch["output_file_id"]).text.splitlines()
    first, picture, file = (json.loads(line)["response"]["body"] for line in output)
    assert first["num_frames"] == 9 and "num_frames" not in picture
    assert first["data"][0]["b64_json"] == clip_of(http, **clip)["data"][0]["b64_json"]
    assert len(list(read_frames(http.get(file["data"][0]["url"]).content))) == 5


def test_steps_are_chosen_by_budget(http: httpx.Client) -> None:
    answer = clip_of(http, model="wan", num_inference_steps="auto", latency_budget_ms=60_000.0)
    assert (answer["data"][0]["num_inference_steps"], answer["latency_budget_kept"]) == (4, True)
    refused = http.post(GENERATIONS, json=CLIP | {"model": "wan", "latency_budget_ms": 0.01})
    assert "raise the budget to at least" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "fields", "param", "message"),
    [
        ("/v1/images/generations", {"model": "wan"}, "model", "which makes clips; send the request to /v1/videos"),
        (GENERATIONS, {"model": "lcm"}, "model", "makes pictures; /v1/videos makes a walk"),
        ("/v1/videos", {"model": "wan", "num_frames": 10}, "num_frames", "4 k + 1 frames, at most 33: take 9"),
        ("/v1/videos", {"model": "wan", "seconds": 12}, "seconds", "192 frames at 16 fps; wan makes 4 k + 1 frames"),
        ("/v1/videos", {"model": "wan", "num_frames": 9, "seconds": 1}, "num_frames", "leave one out"),
        ("/v1/videos", {"model": "lcm", "num_frames": 400}, "num_frames", "at most 360"),
        ("/v1/videos", {"model": "wan", "size": "100x100"}, "size", "take 96x96"),
        ("/v1/videos", {"model": "wan", "fps": 31}, "fps", "less than or equal to 30"),
        ("/v1/videos", {"model": "wan", "decoder": "tiny"}, "decoder", "wan has full"),
        (GENERATIONS, {"model": "wan", "prompt": ["a", "b"]}, "prompt", "valid string"),
        (GENERATIONS, {"model": "wan", "output_format": "png"}, "output_format", "'mp4', 'webm', 'webp' or 'gif'"),
    ],
)
def test_what_cannot_be_made_is_refused_by_name(
    http: httpx.Client, path: str, fields: dict[str, Any], param: str, message: str
) -> None:
    answer = http.post(path, json={"prompt": PROMPT} | fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert message in error["message"]


@pytest.mark.skipif(not CHROMIUM.exists(), reason=f"{CHROMIUM} is missing; apt-get install chromium")
def test_the_playground_shows_a_clip_and_downloads_it(served: Served, tmp_path: Path) -> None:
    """Where motion is unwelcome the clip stands still until it is played."""
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_context(reduced_motion="reduce").new_page()
        complaints: list[str] = []
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(f"{served.running.url}/#model=wan&prompt=a+red+fox&num_frames=5&seed=7")
        sync_api.expect(page.locator("#facts")).to_have_text("64x32 · 5 frames · 4 steps · seed 7", timeout=20_000)
        sync_api.expect(page.locator("#filmstrip button")).to_have_count(4)
        sync_api.expect(page.locator("#picture")).to_have_attribute("src", re.compile("^data:image/png"))
        page.get_by_role("button", name="Play the clip").click()
        sync_api.expect(page.locator("#picture")).to_have_attribute("src", re.compile("^data:image/webp"))
        with page.expect_download() as download:
            page.get_by_role("link", name="Download").click()
        assert download.value.suggested_filename == "a-red-fox-seed7-steps4.mp4"
        download.value.save_as(tmp_path / "clip.mp4")
        browser.close()
    assert complaints == []
    assert tdm_generate(["--verify", str(tmp_path / "clip.mp4"), "--checkpoint", str(served.folders["wan"])]) == 0
