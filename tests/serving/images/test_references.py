"""Reference edits of FLUX.2: the official client, JSON and gRPC, receipts, refusals."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import openai
import pytest
from numpy.typing import NDArray
from PIL import Image

from serving.rpc.protos import images_pb2 as pb
from serving.rpc.protos import images_pb2_grpc
from serving.schema.order import ImageOrder
from tdm_runtime.cli import main as tdm_generate
from tdm_runtime.edit import GivenPicture
from tdm_runtime.params import SamplingParams
from tests.reference_pictures import picture_of
from tests.serving.images.conftest import Served

PROMPT = {"prompt": "a red fox beside a river", "seed": 7, "model": "flux2"}


def file_of(width: int, height: int, seed: int = 0) -> bytes:
    stream = io.BytesIO()
    picture_of(width, height, seed).save(stream, "PNG")
    return stream.getvalue()


FILES = [file_of(107, 79), file_of(64, 130, seed=1)]
"""Read as 96x64 and 64x128."""


def pixels(content: bytes) -> NDArray[np.int_]:
    return np.asarray(Image.open(io.BytesIO(content))).astype(int)


def encoded(files: list[bytes]) -> list[str]:
    return [base64.b64encode(file).decode() for file in files]


def edited(http: httpx.Client, **fields: Any) -> httpx.Response:
    return http.post("/v1/images/edits", json=PROMPT | fields)


def made(http: httpx.Client, **fields: Any) -> dict[str, Any]:
    answer = edited(http, **fields)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def test_every_way_to_ask_makes_one_picture_that_can_be_made_again(
    http: httpx.Client, client: openai.OpenAI, served: Served, tmp_path: Path
) -> None:
    extra = {"seed": 7}
    official = client.images.edit(image=FILES, prompt=PROMPT["prompt"], model="flux2", extra_body=extra).model_dump()  # type: ignore[arg-type]
    by_json = made(http, image=encoded(FILES))
    with grpc.insecure_channel(f"127.0.0.1:{served.running.grpc_port}", (("grpc.enable_http_proxy", 0),)) as channel:
        stub = images_pb2_grpc.ImageServiceStub(channel)
        by_grpc = stub.Generate(pb.GenerateRequest(**PROMPT, image=FILES), timeout=60).images[0]  # type: ignore[arg-type]
        (card,) = (model for model in stub.ListModels(pb.ListModelsRequest()).models if model.id == "flux2")
    contents = [base64.b64decode(answer["data"][0]["b64_json"]) for answer in (official, by_json)]
    for content in (contents[1], by_grpc.content):
        assert np.abs(pixels(content) - pixels(contents[0])).max() <= 2
    assert by_json["size"] == "96x64", "the size of the first reference"
    assert by_json["usage"]["input_tokens_details"]["image_tokens"] == 4 * 6 + 4 * 8
    receipt = by_json["data"][0]["receipt"]
    assert receipt["references"] == ["96x64", "64x128"] == [*by_grpc.receipt.references]
    assert receipt["edit_sha256"] == by_grpc.receipt.edit_sha256 and receipt["strength"] is None
    assert card.max_references == 4

    made_file, files = tmp_path / "made.png", [tmp_path / f"{n}.png" for n in range(2)]
    for file, content in zip((made_file, *files), (contents[1], *FILES), strict=True):
        file.write_bytes(content)
    check = ["--verify", str(made_file), "--checkpoint", str(served.folders["flux2"])]
    assert tdm_generate([*check, "--image", str(files[0]), "--image", str(files[1])]) == 0
    assert tdm_generate([*check, "--image", str(files[1]), "--image", str(files[0])]) == 2


def test_references_change_the_picture_and_one_may_be_sent_alone(http: httpx.Client) -> None:
    one, other, plain = (
        made(http, size="64x64", image=encoded(FILES[:1])),
        made(http, size="64x64", image=encoded(FILES[1:])[0]),
        http.post("/v1/images/generations", json=PROMPT | {"size": "64x64"}).json(),
    )
    assert len({answer["data"][0]["receipt"]["pixels_sha256"] for answer in (one, other, plain)}) == 3


def test_a_strength_or_a_mask_starts_from_the_picture(http: httpx.Client) -> None:
    mask = base64.b64encode(file_of(107, 79)).decode()
    for fields, strength in (({"strength": 0.5}, 0.5), ({"mask": mask}, 1.0)):
        receipt = made(http, image=encoded(FILES[:1]), **fields)["data"][0]["receipt"]
        assert receipt["strength"] == strength and receipt["references"] == []


def test_references_count_in_quotas_as_pictures_of_their_size() -> None:
    picture = SamplingParams("a fox", 0, 4, 100, 100, references=(GivenPicture(np.zeros((50, 200, 3), np.uint8)),) * 2)
    assert ImageOrder("klein", (picture,)).cost == pytest.approx(0.12)


def test_auto_steps_and_a_budget_take_references(http: httpx.Client) -> None:
    answer = made(http, image=encoded(FILES), num_inference_steps="auto", latency_budget_ms=60_000.0)
    assert answer["latency_budget_kept"] and answer["data"][0]["num_inference_steps"] == 4
    refused = edited(http, image=encoded(FILES), num_inference_steps="auto", latency_budget_ms=0.01)
    assert refused.status_code == 400 and "raise the budget to at least" in refused.text


@pytest.mark.parametrize(
    ("files", "fields", "message"),
    [
        (FILES * 3, {}, "image holds 6 pictures; flux2 reads at most 4 references, send fewer"),
        ([], {}, "image holds 0 pictures; flux2 reads at most 4 references, send at least one"),
        (
            FILES,
            {"strength": 0.5},
            "image holds 2 pictures; flux2 starts from one picture, send one, or leave strength and mask out for "
            "references",
        ),
        (FILES, {"model": "sana"}, "image holds 2 pictures; sana starts from one picture, send one"),
        ([file_of(40, 64)], {}, "a reference picture is 40x64; its sides must be at least 64 pixels and at most 8:1"),
        ([FILES[0], b"no picture"], {}, "image is no file of PNG"),
    ],
)
def test_what_is_wrong_is_named(http: httpx.Client, files: list[bytes], fields: dict[str, Any], message: str) -> None:
    answer = edited(http, image=encoded(files), **fields)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "image"
    assert message in answer.json()["error"]["message"]
