"""Files of a real server: C2PA's own reader accepts their manifests, and the watermark's own decoder finds it."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from PIL import Image

from serving.rpc.protos import images_pb2 as pb
from serving.rpc.protos import images_pb2_grpc
from tdm_runtime.cli import main as tdm_generate
from tdm_runtime.media.watermark import MESSAGE, METHOD
from tests.serving.conftest import RunningServer, start_server
from tests.tiny_checkpoint import write_tiny_checkpoint

pytest.importorskip("c2pa", exc_type=ImportError)
pytest.importorskip("imwatermark", exc_type=ImportError)

from tests.c2pa_files import Credentials, assertion, message_in, receipt_in, write_credentials

REQUEST = {"prompt": "a red apple", "seed": 7, "num_inference_steps": 2, "size": "256x256"}


@pytest.fixture(scope="module")
def credentials(tmp_path_factory: pytest.TempPathFactory) -> Credentials:
    return write_credentials(tmp_path_factory.mktemp("credentials"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("large") / "checkpoint", ((256, 256), (16, 16)))


@pytest.fixture(scope="module")
def signing_server(
    folder: Path, credentials: Credentials, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    log = tmp_path_factory.mktemp("signing") / "log"
    torch = ["--checkpoint", str(folder), "--backend", "torch", "--threads", "1", "--max-batch-size", "1"]
    running = start_server(log, *torch, "--provenance", "c2pa,watermark", *credentials.arguments)
    yield running
    assert running.stop() == 0, running.log.read_text()[-2000:]


@pytest.fixture
def http(signing_server: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=signing_server.url, timeout=60) as client:
        yield client


def posted(http: httpx.Client, path: str, **fields: Any) -> dict[str, Any]:
    answer = http.post(path, json=REQUEST | fields)
    assert answer.status_code == 200, answer.text
    content: dict[str, Any] = answer.json()
    return content


def is_marked(content: bytes) -> bool:
    pixels = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    return message_in(pixels) == MESSAGE


@pytest.mark.parametrize("output_format", ["png", "webp", "jpeg"])
def test_every_picture_file_has_a_manifest_and_a_watermark(
    http: httpx.Client, credentials: Credentials, folder: Path, tmp_path: Path, output_format: str
) -> None:
    answer = posted(http, "/v1/images/generations", output_format=output_format, strict=True)
    content, receipt = base64.b64decode(answer["data"][0]["b64_json"]), answer["data"][0]["receipt"]
    manifest = credentials.manifest(content, output_format)
    assert receipt_in(manifest) == receipt
    created, marked = assertion(manifest, "c2pa.actions.v2")["actions"]
    assert created["digitalSourceType"].endswith("/trainedAlgorithmicMedia")
    assert marked["action"] == "c2pa.watermarked.unbound"
    assert (answer["warnings"], receipt["watermark"]) == ([], METHOD)
    if output_format != "jpeg":  # it need not survive compression
        assert is_marked(content)
    if output_format == "png":
        (tmp_path / "apple.png").write_bytes(content)
        assert tdm_generate(["--verify", str(tmp_path / "apple.png"), "--checkpoint", str(folder)]) == 0


def test_an_edit_and_its_preview_say_that_a_picture_was_changed(
    http: httpx.Client, credentials: Credentials, signing_server: RunningServer
) -> None:
    image = posted(http, "/v1/images/generations")["data"][0]["b64_json"]
    edited = posted(http, "/v1/images/edits", image=image)["data"][0]["b64_json"]
    actions = credentials.actions(base64.b64decode(edited), "png")
    assert [one["action"] for one in actions] == ["c2pa.opened", "c2pa.edited", "c2pa.watermarked.unbound"]
    with grpc.insecure_channel(f"127.0.0.1:{signing_server.grpc_port}") as channel:
        asked = pb.GenerateRequest(prompt="a red apple", seed=7, num_inference_steps=2)
        stream = images_pb2_grpc.ImageServiceStub(channel).GenerateStream
        partial, completed = stream(pb.GenerateStreamRequest(picture=asked, partial_images=1))
    for picture in (partial.partial_image.content, completed.completed.images[0].content):
        assert credentials.actions(picture, "png")[0]["action"] == "c2pa.created" and is_marked(picture)
    assert completed.completed.images[0].receipt.watermark == METHOD


def test_a_file_without_metadata_keeps_the_prompt_out_of_its_manifest(
    http: httpx.Client, credentials: Credentials
) -> None:
    answer = posted(http, "/v1/images/generations", metadata=False)
    content = base64.b64decode(answer["data"][0]["b64_json"])
    (actions,) = credentials.manifest(content, "png")["assertions"]
    assert actions["label"] == "c2pa.actions.v2" and b"a red apple" not in content


def test_the_answer_says_what_a_small_picture_lacks(http: httpx.Client, credentials: Credentials) -> None:
    answer = posted(http, "/v1/images/generations", size="16x16")
    assert answer["warnings"] == ["pictures of less than 65536 pixels, such as 16x16, have no watermark"]
    (created,) = credentials.actions(base64.b64decode(answer["data"][0]["b64_json"]), "png")
    assert created["action"] == "c2pa.created"


def test_the_files_of_a_walk_are_signed(http: httpx.Client, credentials: Credentials) -> None:
    fields = {"prompt": "a red apple", "seed": 7, "num_inference_steps": 1, "num_frames": 4, "size": "256x256"}
    video = http.post("/v1/videos", json=fields).json()
    deadline = time.monotonic() + 60
    while video["status"] != "completed" and time.monotonic() < deadline:
        time.sleep(0.1)
        video = http.get(f"/v1/videos/{video['id']}").json()
    assert video["status"] == "completed", video
    for variant, file_format in (("video", "mp4"), ("thumbnail", "png"), ("spritesheet", "png")):
        content = http.get(f"/v1/videos/{video['id']}/content", params={"variant": variant}).content
        assert credentials.actions(content, file_format)[0]["action"] == "c2pa.created"
        assert file_format == "mp4" or is_marked(content)
