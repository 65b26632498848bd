"""POST /v1/images/edits as the official client sends it, as JSON, and over gRPC."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from serving.rpc.protos import images_pb2 as pb
from serving.rpc.protos import images_pb2_grpc
from tdm_runtime.edit import Edit
from tdm_runtime.media.receipt import Receipt
from tests.serving.conftest import RunningServer

PROMPT = {"prompt": "a banana on a blue background", "seed": 3, "num_inference_steps": 4}


def file_of(pixels: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def pixels_of(content: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def answer_pixels(answer: dict[str, Any], index: int = 0) -> Any:
    return pixels_of(base64.b64decode(answer["data"][index]["b64_json"]))


def encoded(content: bytes) -> str:
    return base64.b64encode(content).decode()


@pytest.fixture(scope="module")
def picture(server: RunningServer) -> bytes:
    """A rocket on a blue background."""
    body = {"prompt": "a rocket on a blue background", "seed": 3}
    answer = httpx.post(f"{server.url}/v1/images/generations", json=body, timeout=60)
    return base64.b64decode(answer.json()["data"][0]["b64_json"])


@pytest.fixture(scope="module")
def mask() -> bytes:
    """A mask as OpenAI's: transparent where the picture changes, on its right side."""
    pixels = np.full((64, 64, 4), 255, np.uint8)
    pixels[:, 32:, 3] = 0
    return file_of(pixels)


@pytest.fixture
def images(server: RunningServer) -> Iterator[images_pb2_grpc.ImageServiceStub]:
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}", (("grpc.enable_http_proxy", 0),)) as channel:
        yield images_pb2_grpc.ImageServiceStub(channel)


def edit(http: httpx.Client, **fields: Any) -> dict[str, Any]:
    """Return the answer to a JSON request."""
    answer = http.post("/v1/images/edits", json=PROMPT | fields)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def refusal(http: httpx.Client, **fields: Any) -> dict[str, Any]:
    """Return the error of a JSON request."""
    answer = http.post("/v1/images/edits", json=PROMPT | fields)
    assert answer.status_code == 400, answer.text
    return dict(answer.json()["error"])


def test_the_official_client_edits_as_json_and_grpc_do(
    client: openai.OpenAI,
    http: httpx.Client,
    images: images_pb2_grpc.ImageServiceStub,
    picture: bytes,
    mask: bytes,
) -> None:
    extra = {"seed": 3, "num_inference_steps": 4, "strength": 0.5}
    official = client.images.edit(
        image=("rocket.png", picture), mask=("mask.png", mask), prompt=PROMPT["prompt"], extra_body=extra
    ).model_dump()
    fields = {"image": encoded(picture), "mask": f"data:image/png;base64,{encoded(mask)}", "strength": 0.5}
    by_json = edit(http, **fields)
    by_grpc = images.Generate(pb.GenerateRequest(**PROMPT, image=[picture], mask=mask, strength=0.5))  # type: ignore[arg-type]
    assert np.array_equal(answer_pixels(official), answer_pixels(by_json))
    assert np.array_equal(answer_pixels(official), pixels_of(by_grpc.images[0].content))
    (made,) = by_json["data"]
    assert (made["num_inference_steps"], made["num_steps_taken"]) == (4, 2)
    assert by_grpc.images[0].num_steps_taken == 2 and by_grpc.images[0].receipt.strength == 0.5
    assert len(by_json["timings"]["steps_ms"]) == 2


def test_the_mask_keeps_the_rest_bit_for_bit(http: httpx.Client, picture: bytes, mask: bytes) -> None:
    answer = edit(http, image=encoded(picture), mask=encoded(mask), n=2)
    first, second = (answer_pixels(answer, n) for n in range(2))
    given = pixels_of(picture)
    assert np.array_equal(first[:, :28], given[:, :28]) and not np.array_equal(first[:, 32:], given[:, 32:])
    assert not np.array_equal(first[:, 32:], second[:, 32:])
    assert answer["data"][0]["num_steps_taken"] == 4, "what a mask covers is made anew"


def test_the_receipt_names_the_edit(http: httpx.Client, picture: bytes) -> None:
    (made,) = edit(http, image=encoded(picture), strength=0.75)["data"]
    receipt = Receipt(**made["receipt"])
    wanted = Edit(pixels_of(picture), 0.75)
    assert (receipt.strength, receipt.edit_sha256) == (0.75, wanted.digest)
    assert receipt.to_params(wanted).num_steps == 3


def test_a_file_is_answered_with_the_steps_that_ran(http: httpx.Client, picture: bytes) -> None:
    body = PROMPT | {"image": encoded(picture), "strength": 0.25}
    answer = http.post("/v1/images/edits", json=body, headers={"accept": "image/webp"})
    assert answer.headers["content-type"] == "image/webp" and answer.headers["x-tdm-num-steps-taken"] == "1"
    assert pixels_of(answer.content).shape == (64, 64, 3)


def test_a_stream_has_the_events_of_edits(client: openai.OpenAI, picture: bytes) -> None:
    events = list(client.images.edit(image=("rocket.png", picture), prompt="a cat face", stream=True, partial_images=2))
    assert [event.type for event in events] == ["image_edit.partial_image"] * 2 + ["image_edit.completed"]


def test_size_auto_is_the_nearest_to_the_pictures_and_says_what_it_changed(http: httpx.Client) -> None:
    wide = np.zeros((50, 100, 4), np.uint8)
    answer = edit(http, image=encoded(file_of(wide)))
    assert answer["size"] == "64x64"
    shape, transparent = answer["warnings"]
    assert "the picture is 100x50; scaling it to 64x64 changes its shape, crop it first" in shape
    assert "transparent parts were made white" in transparent


def test_an_idempotency_key_gets_the_same_answer_once(http: httpx.Client, picture: bytes) -> None:
    body = {"prompt": "a fox", "image": encoded(picture)}
    headers = {"idempotency-key": "edit-1"}
    first, again = (http.post("/v1/images/edits", json=body, headers=headers).json() for _ in range(2))
    assert first == again
    other = http.post("/v1/images/edits", json=body | {"strength": 0.5}, headers=headers)
    assert other.status_code == 422


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({}, "image", "image is required"),
        ({"image": None}, "image", "image is required"),
        ({"image": []}, "image", "image holds 0 pictures; tdm-emoji starts from one picture, send one"),
        ({"image": ["AA==", "AA=="]}, "image", "image holds 2 pictures; tdm-emoji starts from one picture, send one"),
        ({"image": "https://example.com/x.png"}, "image", "no address is fetched, send the bytes"),
        ({"image": "file:///etc/passwd"}, "image", "no address is fetched, send the bytes"),
        ({"image": "no base64!"}, "image", "image is no base64"),
        ({"image": "AAAA"}, "image", "image is no file of PNG, JPEG, WEBP, GIF, BMP; send one of these"),
        ({"image": 7}, "image", "image is 7"),
        ({"strength": 0}, "strength", "strength is 0"),
        ({"strength": 1.5}, "strength", "strength is 1.5"),
        ({"size": "63x64"}, "size", "size is 63x64"),
        ({"model": "tdm-emoji-video"}, "model", "does not exist"),
        ({"images": []}, "images", "'images' is not a parameter; send image"),
        ({"denoising_strength": 0.5}, "denoising_strength", "send strength"),
    ],
)
def test_what_is_wrong_is_named(
    http: httpx.Client, picture: bytes, fields: dict[str, Any], param: str, message: str
) -> None:
    given = {} if "image" in fields or not fields else {"image": encoded(picture)}
    if param == "model":
        answer = http.post("/v1/images/edits", json=PROMPT | given | fields)
        assert answer.status_code == 404 and message in answer.text
        return
    error = refusal(http, **given, **fields)
    assert error["param"] == param and message in error["message"]


def test_a_mask_of_another_size_is_refused(http: httpx.Client, picture: bytes) -> None:
    error = refusal(http, image=encoded(picture), mask=encoded(file_of(np.zeros((32, 64), np.uint8))))
    assert error["message"] == "the mask is 64x32 and the picture 64x64; send one size" and error["param"] == "mask"


def test_a_form_with_two_pictures_or_other_files_is_refused(http: httpx.Client, picture: bytes) -> None:
    two = [("image[]", ("a.png", picture)), ("image[]", ("b.png", picture))]
    answer = http.post("/v1/images/edits", data={"prompt": "a fox"}, files=two)
    assert answer.status_code == 400 and "image holds 2 pictures" in answer.text
    other = http.post("/v1/images/edits", data={"prompt": "a fox"}, files={"video": ("a.mp4", picture)})
    assert other.status_code == 400 and "'video' is a file" in other.text
    both = http.post("/v1/images/edits", data={"prompt": "x", "image": "AAAA"}, files={"image": ("a.png", picture)})
    assert both.status_code == 400 and "'image' is text and a file" in both.text


def test_a_body_that_is_too_large_is_refused(http: httpx.Client) -> None:
    answer = http.post("/v1/images/edits", data={"prompt": "x"}, files={"image": ("a.png", bytes(17 * 2**20))})
    assert answer.status_code == 413 and "16777216 bytes" in answer.text


def test_variations_name_what_makes_them(http: httpx.Client) -> None:
    answer = http.post("/v1/images/variations", files={"image": ("a.png", b"x")})
    assert answer.status_code == 404 and "POST /v1/images/edits" in answer.json()["error"]["message"]


def test_grpc_refuses_a_damaged_picture(images: images_pb2_grpc.ImageServiceStub) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        images.Generate(pb.GenerateRequest(prompt="a fox", image=[b"not a picture"]))
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "image is no file of PNG" in refused.value.details()
