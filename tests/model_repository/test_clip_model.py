"""Triton models of clips: raw frames and files, previews, and what is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from tdm_runtime import BackendConfig, LoadedModel, SamplingParams, generate, load_model
from tdm_runtime.media.made_file import encode_made
from tdm_runtime.media.receipt import receipt_of
from tests.model_repository.clients import ask, ask_http
from tests.model_repository.triton_server import TritonServer

CLIP: dict[str, Any] = {
    "prompt": "a red fox",
    "seed": 7,
    "num_inference_steps": 2,
    "num_frames": 3,
    "size": "64x48",
    "strict": True,
}


@pytest.fixture(scope="module")
def model(clip_folder: Path) -> LoadedModel:
    """The server's model in this process."""
    return load_model(clip_folder, BackendConfig("torch", "fp32", threads=1), "cpu")


def test_clips_are_those_of_the_library_bit_for_bit(triton: TritonServer, model: LoadedModel) -> None:
    """As raw frames over the stream and HTTP, and as files with their receipts inside."""
    params = SamplingParams("a red fox", 7, 2, 64, 48, frames=3)
    wanted = generate(model, params)
    streamed, answered = ask(triton.grpc, "clips", **CLIP).picture, ask_http(triton.http, "clips_http", **CLIP)
    for clip in (streamed, answered):
        assert clip["generated_clip"].dtype == np.uint8
        np.testing.assert_array_equal(clip["generated_clip"], wanted)
        assert json.loads(clip["receipt"])["frames"] == 3 and not clip.keys() & {"generated_image", "encoded_clip"}
    receipt = receipt_of(model, params, wanted, is_strict=True)
    for name in ("mp4", "webm", "webp", "gif"):
        made = ask(triton.grpc, "clips", **CLIP | {"output_format": name}).picture
        assert made["encoded_clip"] == encode_made(model, params, wanted, name, receipt=receipt)  # type: ignore[arg-type]


def test_fps_changes_the_file_and_no_pixel(triton: TritonServer, model: LoadedModel) -> None:
    """0 takes the recipe's."""
    for fps, shown in ((5, 5), (0, model.recipe.fps)):
        made = ask(triton.grpc, "clips", **CLIP | {"fps": fps, "output_format": "mp4"}).picture
        with av.open(io.BytesIO(made["encoded_clip"])) as container:
            assert container.streams.video[0].average_rate == shown
        assert made["receipt"] == ask(triton.grpc, "clips", **CLIP).picture["receipt"]
    np.testing.assert_array_equal(
        ask_http(triton.http, "clips_http", **CLIP, fps=5)["generated_clip"],
        ask(triton.grpc, "clips", **CLIP).picture["generated_clip"],
    )


def test_previews_are_pictures_of_the_first_frame(triton: TritonServer) -> None:
    fields = CLIP | {"num_inference_steps": 0, "num_frames": 0, "previews": True, "output_format": "mp4"}
    *previews, clip = ask(triton.grpc, "clips", **fields).responses
    assert [preview["num_inference_steps"] for preview in previews] == [1, 2, 3]
    assert Image.open(io.BytesIO(previews[0]["encoded_image"])).size == (64, 48)
    assert json.loads(clip["receipt"])["frames"] == 16, "the default of the recipe"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"output_format": "png"}, "makes clips: raw, mp4, webm, webp, gif"),
        ({"num_frames": 25}, "makes 1 to 24 frames: take 24"),
        ({"num_frames": -1}, "makes 1 to 24 frames: take 1"),
        ({"fps": 121}, "fps is 121; it must be a whole number from 1 to 120"),
        ({"fps": -1}, "fps is -1; it must be a whole number from 1 to 120"),
        ({"size": "64x47"}, "size is 64x47"),
    ],
)
def test_what_a_clip_cannot_be_is_refused(triton: TritonServer, fields: dict[str, Any], message: str) -> None:
    assert message in ask(triton.grpc, "clips", **CLIP | fields).error.message()
