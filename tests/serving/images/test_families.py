"""One server with stock folders of several families, asked as a user would over HTTP and gRPC."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
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
from tdm_runtime.checkpoint.recipe import RECIPE_FILE
from tdm_runtime.cli import main as tdm_generate
from tests.serving.images.conftest import Served

PROMPT = "a red fox beside a long green river"
"""Longer than the tiny CLIPs read, which stock pipelines would log."""
NATIVE = "64x64"


@pytest.fixture
def images(served: Served) -> Iterator[images_pb2_grpc.ImageServiceStub]:
    address, options = f"127.0.0.1:{served.running.grpc_port}", (("grpc.enable_http_proxy", 0),)
    with grpc.insecure_channel(address, options) as channel:
        yield images_pb2_grpc.ImageServiceStub(channel)


def made(http: httpx.Client, **fields: Any) -> dict[str, Any]:
    answer = http.post("/v1/images/generations", json={"prompt": PROMPT, "seed": 7, **fields})
    assert answer.status_code == 200, answer.text
    content: dict[str, Any] = answer.json()
    return content


def pixels(b64_json: str) -> NDArray[np.int_]:
    """Return a picture's levels, [H, W, 3]."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64_json)))).astype(int)


def refusal(http: httpx.Client, **fields: Any) -> str:
    answer = http.post("/v1/images/generations", json={"prompt": PROMPT, **fields})
    assert answer.status_code == 400, answer.text
    return str(answer.json()["error"]["message"])


def test_the_cards_of_http_and_grpc_say_what_each_model_makes(
    client: openai.OpenAI, images: images_pb2_grpc.ImageServiceStub
) -> None:
    cards = {card.id: card.model_extra or {} for card in client.models.list()}
    assert {name: card["family"] for name, card in cards.items()} == {
        "lcm": "stable_diffusion",
        "sana": "sana",
        "flux2": "flux2",
        "sdxl": "sdxl",
        "merged": "sdxl",
        "added": "sdxl",
        "wan": "wan",
        "animatediff": "animatediff",
    }
    assert {name: card["guidance_scale"] for name, card in cards.items() if card["guidance_scale"] is not None} == {
        "lcm": 7.5,
        "sana": 4.5,
    }
    assert (cards["lcm"]["recipe"], cards["merged"]["recipe"]) == ("implied by scheduler_config.json", RECIPE_FILE)
    assert cards["lcm"]["step_counts"] == [*range(1, 9)]
    assert cards["added"]["base"] == "sdxl"
    messages = {model.id: model for model in images.ListModels(pb.ListModelsRequest()).models}
    assert list(messages) == list(cards)
    for name, card in cards.items():
        message = messages[name]
        sizes = ["64x32"] if name == "wan" else [NATIVE]
        assert (message.family, message.recipe, message.sizes) == (card["family"], card["recipe"], sizes)
        assert {field: getattr(message.size_rule, field) for field in card["size_rule"]} == card["size_rule"]
        assert message.HasField("guidance_scale") == (card["guidance_scale"] is not None)


@pytest.mark.parametrize("name", ["lcm", "sana", "flux2", "merged"])
def test_a_picture_of_any_allowed_size_can_be_made_again_from_its_file(
    name: str, served: Served, client: openai.OpenAI, tmp_path: Path
) -> None:
    for size in ("auto", "96x32"):
        answer = client.images.generate(model=name, prompt=PROMPT, size=size, extra_body={"seed": 7})  # type: ignore[call-overload]
        assert answer.size == (NATIVE if size == "auto" else size)
        file = tmp_path / f"{size}.png"
        file.write_bytes(base64.b64decode(answer.data[0].b64_json))
    assert tdm_generate(["--verify", str(file), "--checkpoint", str(served.folders[name])]) == 0


def test_a_lora_added_at_run_time_makes_the_picture_of_the_merged_one(http: httpx.Client) -> None:
    """The LoRA changes the UNet and both text encoders."""
    import numpy as np

    added, merged, base = (
        pixels(made(http, model=name, num_inference_steps=2)["data"][0]["b64_json"])
        for name in ("added", "merged", "sdxl")
    )
    assert np.abs(added - merged).max() <= 3
    assert np.abs(added - base).max() > 20


def test_guidance_is_read_by_the_models_that_have_an_input_for_it(
    http: httpx.Client, images: images_pb2_grpc.ImageServiceStub
) -> None:
    for name in ("lcm", "sana"):
        usual, strong = (made(http, model=name, **fields)["data"][0] for fields in ({}, {"guidance_scale": 2.0}))
        assert usual["b64_json"] != strong["b64_json"]
        assert strong["receipt"]["guidance_scale"] == 2.0
    assert "flux2 has guidance distilled in and reads no scale; leave it out" in refusal(
        http, model="flux2", guidance_scale=2.0
    )
    assert "negative_prompt needs" in refusal(http, model="sana", negative_prompt="blurred")
    request = pb.GenerateRequest(prompt=PROMPT, model="sana", guidance_scale=2.0, size=pb.Size(width=96, height=32))
    receipt = images.Generate(request, timeout=60).images[0].receipt
    assert (receipt.guidance_scale, receipt.width, receipt.height) == (2.0, 96, 32)


def test_a_request_scales_the_lora_of_its_model(
    served: Served, http: httpx.Client, images: images_pb2_grpc.ImageServiceStub, tmp_path: Path
) -> None:
    """The LoRA is served at 0.5. Its receipts name the scale, and `tdm-generate` makes its pictures again."""
    answer = http.post(
        "/v1/images/generations",
        json={"prompt": PROMPT, "seed": 7, "model": "added", "num_inference_steps": 2, "lora_scale": 1.3},
        headers={"accept": "image/png"},
    )
    (tmp_path / "strong.png").write_bytes(answer.content)
    strong = np.asarray(Image.open(tmp_path / "strong.png")).astype(int)
    assert "LoRA scale: 1.3" in Image.open(tmp_path / "strong.png").info["parameters"]
    usual, none, base = (
        made(http, num_inference_steps=2, **fields)["data"][0]
        for fields in ({"model": "added"}, {"model": "added", "lora_scale": 0}, {"model": "sdxl"})
    )
    assert (usual["receipt"]["lora_scale"], none["receipt"]["lora_scale"]) == (0.5, 0.0)
    assert base["receipt"]["lora_scale"] is None
    assert np.abs(pixels(none["b64_json"]) - pixels(base["b64_json"])).max() <= 2
    assert np.abs(strong - pixels(usual["b64_json"])).max() > 20

    request = pb.GenerateRequest(prompt=PROMPT, seed=7, model="added", num_inference_steps=2, lora_scale=1.3)
    image = images.Generate(request, timeout=60).images[0]
    assert image.receipt.lora_scale == 1.3
    assert np.abs(np.asarray(Image.open(io.BytesIO(image.content))).astype(int) - strong).max() <= 2
    verify = ["--verify", str(tmp_path / "strong.png"), "--checkpoint", str(served.folders["sdxl"])]
    lora = served.folders["sdxl"].parent / "lora" / "pytorch_lora_weights.safetensors"
    assert tdm_generate([*verify, "--lora", f"{lora}:0.5"]) == 0
    assert tdm_generate(verify) == 2

    assert "the LoRAs of merged are merged into its weights" in refusal(http, model="merged", lora_scale=1)
    assert "sdxl has no LoRA" in refusal(http, model="sdxl", lora_scale=1)
    assert "lora_scale" in refusal(http, model="added", lora_scale=4.5)


def test_the_error_of_a_size_names_the_nearest_allowed_one(
    http: httpx.Client, images: images_pb2_grpc.ImageServiceStub
) -> None:
    assert "multiples of 8 from 8 to 128 with at most 8192 pixels in all: take 104x72" in refusal(
        http, model="lcm", size="1000x700"
    )
    with pytest.raises(grpc.RpcError, match="take 96x48"):
        images.Generate(pb.GenerateRequest(prompt=PROMPT, model="flux2", size=pb.Size(width=97, height=48)), timeout=60)


def test_a_budget_is_kept_at_a_size_that_was_never_measured(http: httpx.Client) -> None:
    order = {"num_inference_steps": "auto", "latency_budget_ms": 60_000.0}
    answer = made(http, model="sana", size="48x96", **order)
    assert answer["latency_budget_kept"] and answer["data"][0]["num_inference_steps"] == 4
    assert "raise the budget to at least" in refusal(
        http, model="sana", size="48x96", **(order | {"latency_budget_ms": 0.01})
    )


def test_a_stream_shows_a_draft_and_the_steps(client: openai.OpenAI) -> None:
    for name in ("sana", "flux2"):
        stream = client.images.generate(
            model=name, prompt=PROMPT, size="96x32", stream=True, partial_images=3, extra_body={"draft": True}
        )  # type: ignore[call-overload]
        parts = [(event.type, getattr(event, "num_steps_taken", None)) for event in stream]
        assert parts == [("image_generation.partial_image", n) for n in (1, 2, 3)] + [("image_generation.completed", 4)]


def test_the_log_says_where_a_recipe_comes_from_and_holds_no_prompt(served: Served) -> None:
    log = served.running.log.read_text()
    said = (
        "lcm has no tdm_recipe.json; its recipe is implied by scheduler_config.json for 1, 2, 3, 4, 5, 6, 7, 8 steps, 4"
    )
    assert log.count(said) == 1 and log.count("has no tdm_recipe.json") == 1
    assert not [line for line in log.splitlines() if "river" in line or "truncated" in line]
