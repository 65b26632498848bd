"""Clips over HTTP, with the official client where it has the call."""

from __future__ import annotations

import io
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from tdm_runtime.checkpoint.folder import DEFAULT_CHECKPOINT
from tdm_runtime.cli import main as tdm_generate
from tdm_runtime.model.artifacts import BackendConfig
from tdm_runtime.model.choice import load_model
from tdm_runtime.model.decoder import Pixels
from tdm_runtime.model.similarity import psnr_db
from tdm_runtime.params import SamplingParams
from tdm_runtime.pipeline import generate
from tests.serving.conftest import RunningServer
from tests.serving.web.test_server import BACKEND_LINE

CLIP = {"prompt": "a red heart", "seed": 7, "seconds": "2", "fps": 4, "num_inference_steps": 2}
PICTURE_TOLERANCE = 2
MIN_CLIP_PSNR_DB = 30.0
"""Lowest PSNR of a decoded frame against its picture."""
TIMEOUT_S = 120.0


@pytest.fixture
def client(server: RunningServer) -> openai.OpenAI:
    """OpenAI's client without its check of answers: the schema lists the sizes and seconds of OpenAI's models."""
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0)


def frames_of(clip: bytes) -> list[Pixels]:
    with av.open(io.BytesIO(clip)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def wait_for_clip(http: httpx.Client, video_id: str, progress: int = 100) -> dict[str, Any]:
    """Poll until a clip has reached this progress or has ended, even while the server restarts."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline_s:
        try:
            video = http.get(f"/v1/videos/{video_id}").json()
            if video["status"] in ("completed", "failed") or (progress < 100 and video["progress"] >= progress):
                return dict(video)
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    pytest.fail(f"{video_id} is not done after {TIMEOUT_S} s")


# -- as the official client asks -------------------------------------------------------------------


def test_the_official_client_makes_a_clip(client: openai.OpenAI, server: RunningServer) -> None:
    """Its frames are the pictures that the reference makes at their angles, and its metadata is right."""
    extra = {name: CLIP[name] for name in ("seed", "fps", "num_inference_steps")}
    video = client.videos.create_and_poll(
        prompt="a red heart", model="tdm-emoji", seconds="2", size="64x64", extra_body=extra
    )
    assert (video.status, video.progress, video.seconds, video.size) == ("completed", 100, "2", "64x64")
    assert video.completed_at is not None and video.expires_at is not None and video.error is None
    shown: Any = video
    assert (shown.motion, shown.num_frames, shown.seed, shown.fps) == ("noise_walk", 8, 7, 4)

    clip = client.videos.download_content(video.id)
    assert clip.response.headers["content-type"] == "video/mp4"
    frames = frames_of(clip.read())
    assert len(frames) == 8
    found = BACKEND_LINE.search(server.log.read_text())
    assert found is not None
    served = load_model(DEFAULT_CHECKPOINT, BackendConfig(found[1], found[2], int(found[3])))  # type: ignore[arg-type]
    first = SamplingParams("a red heart", 7, 2, 64, 64)
    for frame in (0, 3, 7):
        picture = generate(served, replace(first, noise_angle=math.tau * frame / 8))
        assert psnr_db(frames[frame], picture) > MIN_CLIP_PSNR_DB
    thumbnail = Image.open(io.BytesIO(client.videos.download_content(video.id, variant="thumbnail").read()))
    away = np.asarray(thumbnail.convert("RGB")).astype(int) - generate(served, first)
    assert np.abs(away).max() <= PICTURE_TOLERANCE
    sheet = Image.open(io.BytesIO(client.videos.download_content(video.id, variant="spritesheet").read()))
    assert sheet.size == (4 * 64, 4 * 64)
    places = np.asarray(sheet.convert("RGB")).reshape(4, 64, 4, 64, 3).swapaxes(1, 2).reshape(16, 64, 64, 3)
    for place, pixels in enumerate(places):
        assert np.array_equal(pixels, places[place // 2 * 2])  # eight frames, each shown twice
    assert not np.array_equal(places[0], places[2])

    assert video.id in [listed.id for listed in client.videos.list(limit=100)]
    assert client.videos.delete(video.id).deleted is True
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(video.id)


def test_the_same_strict_request_makes_the_same_bytes_and_its_receipt_is_reproduced(
    http: httpx.Client, tmp_path: Path
) -> None:
    """One is sent as JSON, one as a form, and both are made at once."""
    form = {name: (None, str(value)) for name, value in CLIP.items()} | {"strict": (None, "true")}
    answers = [http.post("/v1/videos", json=CLIP | {"strict": True}), http.post("/v1/videos", files=form)]
    ids = [answer.json()["id"] for answer in answers]
    for video_id in ids:
        assert wait_for_clip(http, video_id)["status"] == "completed"
    one, other = (http.get(f"/v1/videos/{video_id}/content").content for video_id in ids)
    assert one == other
    file = tmp_path / "thumbnail.png"
    file.write_bytes(http.get(f"/v1/videos/{ids[0]}/content", params={"variant": "thumbnail"}).content)
    assert tdm_generate(["--verify", str(file)]) == 0


def test_an_unfinished_clip_has_a_poll_interval_and_can_be_deleted(http: httpx.Client) -> None:
    answer = http.post("/v1/videos", json=CLIP | {"seconds": 12, "fps": 30})
    assert int(answer.headers["openai-poll-after-ms"]) > 0
    video = answer.json()
    assert (video["status"], video["completed_at"], video["expires_at"]) == ("queued", None, None)
    content = http.get(f"/v1/videos/{video['id']}/content")
    assert content.status_code == 409 and content.headers["x-should-retry"] == "false"
    wait_for_clip(http, video["id"], progress=1)
    assert http.delete(f"/v1/videos/{video['id']}").json() == {
        "id": video["id"],
        "object": "video.deleted",
        "deleted": True,
    }
    assert http.get(f"/v1/videos/{video['id']}").status_code == 404
    deadline_s = time.monotonic() + 10
    while "tdm_live_samples 0.0" not in http.get("/metrics").text:
        assert time.monotonic() < deadline_s, "its pictures are still being made"
        time.sleep(0.05)


def test_clips_are_listed_in_pages(http: httpx.Client) -> None:
    ids = [http.post("/v1/videos", json=CLIP | {"seconds": 1, "fps": 1, "seed": n}).json()["id"] for n in range(3)]
    for video_id in ids:
        wait_for_clip(http, video_id)
    page = http.get("/v1/videos", params={"limit": 2}).json()
    assert [video["id"] for video in page["data"]] == ids[:0:-1]
    assert (page["first_id"], page["last_id"], page["has_more"]) == (ids[2], ids[1], True)
    page = http.get("/v1/videos", params={"limit": 1, "after": ids[1]}).json()
    assert [video["id"] for video in page["data"]] == [ids[0]]
    page = http.get("/v1/videos", params={"limit": 2, "after": ids[0], "order": "asc"}).json()
    assert [video["id"] for video in page["data"]] == ids[1:]
    for query in ({"limit": 0}, {"limit": 101}, {"limit": "x"}, {"order": "up"}):
        answer = http.get("/v1/videos", params=query)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, next(iter(query)))
    assert http.get("/v1/videos", params={"after": "video_x"}).status_code == 404


def test_an_idempotency_key_gives_the_same_job(http: httpx.Client) -> None:
    headers = {"idempotency-key": f"clip-{time.time()}"}
    small = CLIP | {"seconds": 1, "fps": 1}
    first = http.post("/v1/videos", json=small, headers=headers).json()
    form = {name: (None, str(value)) for name, value in small.items()}
    assert http.post("/v1/videos", json=small, headers=headers).json()["id"] == first["id"]
    assert http.post("/v1/videos", files=form | {"seconds": (None, "2")}, headers=headers).status_code == 422
    assert http.post("/v1/videos", json=small | {"seed": 8}, headers=headers).status_code == 422
    wait_for_clip(http, first["id"])


# -- hostile ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"seconds": "1e9"}, "seconds"),
        ({"seconds": "0"}, "seconds"),
        ({"seconds": "13"}, "seconds"),
        ({"seconds": "-4"}, "seconds"),
        ({"seconds": "\N{FULLWIDTH DIGIT FOUR}"}, "seconds"),
        ({"fps": "31"}, "fps"),
        ({"fps": "1e1"}, "fps"),
        ({"fps": "9" * 5000}, "fps"),
        ({"seed": "-2"}, "seed"),
        ({"seed": str(2**64)}, "seed"),
        ({"size": "720x1280"}, "size"),
        ({"model": "sora-2"}, "model"),
        ({"num_inference_steps": "9"}, "num_inference_steps"),
        ({"remix": "x"}, "remix"),
    ],
)
@pytest.mark.parametrize("form", [True, False], ids=["form", "json"])
def test_a_bad_value_is_refused_with_the_name_of_its_field(
    http: httpx.Client, fields: dict[str, str], param: str, form: bool
) -> None:
    fields = {"prompt": "a"} | fields
    body: dict[str, Any] = (
        {"files": {name: (None, text) for name, text in fields.items()}} if form else {"json": fields}
    )
    answer = http.post("/v1/videos", **body)
    assert answer.status_code in (400, 404), answer.text
    assert answer.json()["error"]["param"] == param
    assert len(answer.text) < 600


@pytest.mark.parametrize(
    ("content_type", "body", "status"),
    [
        ("multipart/form-data", b"x", 400),
        ("multipart/form-data; boundary=", b"x", 400),
        ("multipart/form-data; boundary=a", b"--b\r\n\r\nx\r\n--b--\r\n", 400),
        ("multipart/form-data; boundary=a", b"--a\r\nno header\r\n\r\n", 400),
        ("multipart/form-data; boundary=a", b"", 400),
        (
            "multipart/form-data; boundary=a",
            b'--a\r\ncontent-disposition: form-data; name="prompt"\r\n\r\n' + b"x" * 100_000 + b"\r\n--a--\r\n",
            413,
        ),
        (
            "multipart/form-data; boundary=a",
            b'--a\r\ncontent-disposition: form-data; name="input_reference"; filename="x"\r\n\r\nx\r\n--a--\r\n',
            400,
        ),
        (
            "multipart/form-data; boundary=a",
            b'--a\r\ncontent-disposition: form-data; name="prompt"\r\n\r\nx\r\n' * 2 + b"--a--\r\n",
            400,
        ),
        (
            "multipart/form-data; boundary=a",
            b'--a\r\ncontent-disposition: form-data; name="x"\r\n\r\nx\r\n' * 100 + b"--a--\r\n",
            400,
        ),
        ("text/plain", b"x", 415),
    ],
)
def test_a_bad_form_is_refused(http: httpx.Client, content_type: str, body: bytes, status: int) -> None:
    answer = http.post("/v1/videos", content=body, headers={"content-type": content_type})
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize("given", [b"a picture", "file-abc"])
def test_an_input_reference_is_named_and_not_supported(http: httpx.Client, given: bytes | str) -> None:
    """As a file, as `videos.create` sends it, and as text."""
    if isinstance(given, bytes):
        answer = http.post("/v1/videos", data={"prompt": "a fox"}, files={"input_reference": ("fox.png", given)})
    else:
        answer = http.post("/v1/videos", json={"prompt": "a fox", "input_reference": given})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "input_reference")
    assert "'input_reference' is" in error["message"] and "not supported" in error["message"]


@pytest.mark.parametrize("video_id", ["video_x", "..%2f..", "x" * 2000, "batch_0", "%00", "video_x%27%20OR%201=1"])
def test_an_unknown_clip_is_a_404(http: httpx.Client, video_id: str) -> None:
    for answer in (
        http.get(f"/v1/videos/{video_id}"),
        http.get(f"/v1/videos/{video_id}/content"),
        http.delete(f"/v1/videos/{video_id}"),
    ):
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


def test_an_unknown_variant_is_refused(http: httpx.Client) -> None:
    answer = http.get("/v1/videos/video_x/content", params={"variant": "../jobs.db"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "variant")
