"""Jobs that an earlier version stored still run as they were accepted."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from serving.config import ModelSource, ServerConfig
from serving.images.local import ImageService
from serving.jobs.artifacts import ArtifactStore
from serving.jobs.batch_job import BatchRenderer
from serving.jobs.job import FinishedPart, JobLimits, JobRequest, Part
from serving.jobs.store import JobStore
from serving.jobs.video_job import VideoRenderer
from serving.jobs.worker import Renderer
from serving.telemetry.metrics import ServerMetrics
from serving.web.video_schema import to_video
from tdm_runtime.media.provenance import Provenance
from tdm_runtime.media.receipt import RECEIPT_CHUNK
from tdm_runtime.model.artifacts import BackendConfig

KEEP_S = 3600.0
SAMPLING = {
    "prompt": "a cat",
    "seed": 7,
    "num_inference_steps": 2,
    "width": 16,
    "height": 16,
    "decoder": "full",
}
"""`request.sampling` of a clip, as version 0.1 stored it."""
BODY = {"prompt": "a cat", "size": "16x16", "num_inference_steps": 2, "n": 2, "seed": 7, "model": "tdm-emoji"}
"""`body` of a batch's part, as version 0.1 stored it."""


@pytest.fixture(scope="module")
def images(tiny_checkpoint: Path) -> Iterator[ImageService]:
    backend = BackendConfig("torch", threads=1, device="cpu")
    service = ImageService(ServerConfig(models=(ModelSource(tiny_checkpoint),), backend=backend), ServerMetrics())
    yield service
    service.close()


def finished(renderer: Renderer, request: JobRequest, folder: Path) -> FinishedPart:
    """Store a job, claim it as a worker does and make its first part."""
    store = JobStore(f"sqlite:///{folder / 'jobs.db'}", lease_s=30, keep_s=KEEP_S)
    try:
        store.create(request, JobLimits(), lambda: None)
        job = store.claim("worker", [request.model])
        assert job is not None
        part: Part = next(iter(store.unfinished_parts(job)))
        return asyncio.run(renderer.make(job, part))
    finally:
        store.close()


def stored_batch(**body: Any) -> JobRequest:
    parts = [{"custom_id": "a", "body": BODY | body}]
    return JobRequest("batch", "anybody", "tdm-emoji", {"metadata": None, "base_url": "http://test"}, parts)


def test_a_stored_batch_makes_the_pictures_of_its_seeds(images: ImageService, tmp_path: Path) -> None:
    renderer = BatchRenderer(images, ArtifactStore(str(tmp_path / "files")), KEEP_S)
    part = finished(renderer, stored_batch(), tmp_path)
    line = json.loads(part.content)
    assert (line["custom_id"], line["response"]["status_code"], part.is_failed) == ("a", 200, False)
    data = line["response"]["body"]["data"]
    assert [picture["seed"] for picture in data] == [7, 8]
    assert [picture["receipt"]["num_inference_steps"] for picture in data] == [2, 2]
    assert Image.open(io.BytesIO(base64.b64decode(data[0]["b64_json"]))).size == (16, 16)


def test_a_stored_batch_that_the_server_no_longer_accepts_names_the_field(images: ImageService, tmp_path: Path) -> None:
    renderer = BatchRenderer(images, ArtifactStore(str(tmp_path / "files")), KEEP_S)
    part = finished(renderer, stored_batch(num_inference_steps="quick"), tmp_path)
    response = json.loads(part.content)["response"]
    assert (part.is_failed, response["status_code"]) == (True, 400)
    assert response["body"]["error"]["param"] == "num_inference_steps"


def test_a_stored_clip_makes_frames_with_their_receipts(images: ImageService, tmp_path: Path) -> None:
    artifacts = ArtifactStore(str(tmp_path / "files"))
    renderer = VideoRenderer(images, artifacts, KEEP_S, lambda job, progress: None, Provenance())
    request = JobRequest(
        "video",
        "anybody",
        "tdm-emoji",
        {"sampling": SAMPLING, "seconds": 1, "fps": 1, "strict": False},
        [{"noise_angle": 0.5}],
    )
    part = finished(renderer, request, tmp_path)
    picture = Image.open(io.BytesIO(part.content))
    receipt = json.loads(picture.info[RECEIPT_CHUNK])
    assert (picture.format, picture.size) == ("PNG", (16, 16))
    assert (receipt["seed"], receipt["noise_angle"], receipt["num_inference_steps"]) == (7, 0.5, 2)
    assert "a cat" in picture.info["parameters"]


def test_the_progress_of_a_clip_follows_its_steps(tmp_path: Path) -> None:
    sampling = SAMPLING | {"frames": 9}
    clip = {"sampling": sampling, "seconds": 1, "fps": 8, "strict": False, "num_frames": 9, "output_format": "mp4"}
    store = JobStore(f"sqlite:///{tmp_path / 'jobs.db'}", lease_s=30, keep_s=KEEP_S)
    try:
        created = store.create(JobRequest("video", "anybody", "wan", clip, [{}]), JobLimits(), lambda: None)
        job = store.claim("worker", ["wan"])
        assert job is not None
        seen = []
        for progress in (0.25, 0.5, 0.75):
            store.report(job, progress)
            seen.append(to_video(store.get("video", "anybody", created.id)).progress)
        store.save(job, FinishedPart(0, b"clip", is_failed=False))
        seen.append(to_video(store.get("video", "anybody", created.id)).progress)
        store.complete(job, {"video": "id"})
        seen.append(to_video(store.get("video", "anybody", created.id)).progress)
    finally:
        store.close()
    assert seen == [24, 49, 74, 99, 100]
