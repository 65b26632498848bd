"""Clips over gRPC: the answers of HTTP, in typed messages."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from PIL import Image

from serving.rpc.protos import images_pb2 as pb
from serving.rpc.protos import images_pb2_grpc
from tdm_runtime.media.receipt import pixels_sha256
from tdm_runtime.media.video_file import read_frames
from tests.serving.images.conftest import Served

CLIP = {"prompt": "a red fox runs", "model": "wan", "seed": 7, "num_inference_steps": 2, "strict": True}
UNLIMITED = (("grpc.max_receive_message_length", -1), ("grpc.enable_http_proxy", 0))


@pytest.fixture(scope="module")
def channel(served: Served) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"127.0.0.1:{served.running.grpc_port}", UNLIMITED) as opened:
        yield opened


@pytest.fixture(scope="module")
def videos(channel: grpc.Channel) -> images_pb2_grpc.VideoServiceStub:
    return images_pb2_grpc.VideoServiceStub(channel)


def test_a_clip_equals_that_of_http_as_a_file_and_as_pixels(
    videos: images_pb2_grpc.VideoServiceStub, http: httpx.Client
) -> None:
    fields = CLIP | {"num_frames": 5, "fps": 10, "size": pb.Size(width=32, height=64)}
    answer = videos.Generate(pb.GenerateVideoRequest(**fields, output_format=pb.OUTPUT_FORMAT_WEBM))
    body = fields | {"size": "32x64", "output_format": "webm"}
    other = http.post("/v1/videos/generations", json=body).json()
    assert answer.video.content == base64.b64decode(other["data"][0]["b64_json"])
    assert (answer.num_frames, answer.size.width, answer.output_format) == (5, 32, pb.OUTPUT_FORMAT_WEBM)
    assert (answer.video.seed, answer.video.num_inference_steps, answer.video.receipt.frames) == (7, 2, 5)
    assert len(answer.timings.steps_ms) == 2 and answer.usage.total_tokens == other["usage"]["total_tokens"]
    bare = videos.Generate(pb.GenerateVideoRequest(**fields, output_format=pb.OUTPUT_FORMAT_PIXELS)).video
    pixels = np.frombuffer(bare.content, np.uint8).reshape(5, 64, 32, 3)
    assert pixels_sha256(pixels) == answer.video.receipt.pixels_sha256 == other["data"][0]["receipt"]["pixels_sha256"]


def test_a_stream_shows_first_frames_within_its_deadline_and_then_the_clip(
    videos: images_pb2_grpc.VideoServiceStub,
) -> None:
    video = pb.GenerateVideoRequest(prompt="a fox", model="animatediff", auto_steps=pb.AutoSteps(), num_frames=4)
    *partials, last = videos.GenerateStream(pb.GenerateVideoStreamRequest(video=video, partial_images=3), timeout=60)
    assert [event.partial_image.num_steps_taken for event in partials] == [1, 2, 3]
    assert Image.open(io.BytesIO(partials[0].partial_image.content)).size == (64, 64)
    clip = last.completed
    assert (clip.output_format, clip.num_frames, clip.latency_budget_kept) == (pb.OUTPUT_FORMAT_MP4, 4, True)
    assert len(list(read_frames(clip.video.content))) == 4


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        (
            {"model": "lcm"},
            "model",
            "makes pictures; /v1/videos makes a walk of them, /v1/images/generations and gRPC's",
        ),
        ({"num_frames": 10}, "num_frames", "4 k + 1 frames, at most 33: take 9"),
        ({"seconds": 1, "num_frames": 5}, "num_frames", "leave one out"),
        ({"guidance_scale": 5.0}, "guidance_scale", "has guidance distilled in"),
        ({"lora_scale": 0.5}, "lora_scale", "wan has no LoRA"),
        ({"latency_budget_ms": 0.01}, "latency_budget_ms", "raise the budget to at least"),
        ({"output_format": pb.OUTPUT_FORMAT_PNG}, "output_format", "'mp4', 'webm', 'webp' or 'gif'"),
    ],
)
def test_what_cannot_be_made_is_refused_as_over_http(
    videos: images_pb2_grpc.VideoServiceStub, fields: dict[str, Any], param: str, message: str
) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        videos.Generate(pb.GenerateVideoRequest(**CLIP | fields))
    error: Any = refused.value
    assert (error.code(), dict(error.trailing_metadata())["param"]) == (grpc.StatusCode.INVALID_ARGUMENT, param)
    assert message in error.details()


def test_models_of_clips_are_listed_and_asked_for_a_picture_name_the_service(channel: grpc.Channel) -> None:
    images = images_pb2_grpc.ImageServiceStub(channel)
    cards = {card.id: card for card in images.ListModels(pb.ListModelsRequest()).models}
    assert (cards["wan"].frames.default, cards["wan"].frames.max_frames, cards["wan"].fps) == (9, 33, 16)
    assert not cards["lcm"].HasField("frames")
    for fields in (CLIP, CLIP | {"model": "lcm", "output_format": pb.OUTPUT_FORMAT_MP4}):
        with pytest.raises(grpc.RpcError, match=r"over gRPC to VideoService|output_format is 'mp4'; input should be"):
            images.Generate(pb.GenerateRequest(**fields))
