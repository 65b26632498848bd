"""/sdapi/v1 with the requests that Open WebUI and SillyTavern send."""

from __future__ import annotations

import base64
import io
import json
import threading
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from serving.errors import APIError
from serving.fronts.access import Access, APIKey, hash_key, save_keys

SILLY_TAVERN = {
    "prompt": "a red heart",
    "negative_prompt": "ugly",
    "sampler_name": "Euler a",
    "scheduler": "Automatic",
    "steps": 20,
    "cfg_scale": 7,
    "width": 512,
    "height": 512,
    "seed": -1,
    "restore_faces": False,
    "enable_hr": False,
    "hr_upscaler": None,
    "hr_scale": 1,
    "override_settings": {"CLIP_stop_at_last_layers": 1},
    "override_settings_restore_afterwards": True,
    "clip_skip": 1,
    "save_images": True,
    "send_images": True,
    "do_not_save_grid": False,
}
"""A request with the fields that SillyTavern sends."""


def made(http: httpx.Client, route: str, **fields: Any) -> tuple[list[Any], dict[str, Any]]:
    """Return the pictures and the info of an answer."""
    answer = http.post(f"/sdapi/v1/{route}", json=fields)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    pictures = [np.asarray(Image.open(io.BytesIO(base64.b64decode(one))).convert("RGB")) for one in body["images"]]
    return pictures, json.loads(body["info"])


def encoded(pixels: Any) -> str:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def test_a_silly_tavern_request_gets_the_nearest_picture_and_says_what_changed(http: httpx.Client) -> None:
    (picture,), info = made(http, "txt2img", **SILLY_TAVERN)
    assert picture.shape == (64, 64, 3)
    assert info["warnings"] == [
        "steps is 20; tdm-emoji took 4",
        "the size is 512x512; tdm-emoji made 64x64",
        "negative_prompt changes nothing here",
    ]
    assert info["infotexts"][0].startswith("a red heart\nSteps: 4, Sampler: ddim")
    assert info["seed"] == info["all_seeds"][0] and 0 <= info["seed"] < 2**32


def test_the_pictures_are_those_of_the_other_api(http: httpx.Client) -> None:
    pictures, info = made(http, "txt2img", prompt="a fox", seed=5, steps=2, batch_size=2, n_iter=2)
    assert info["all_seeds"] == [5, 6, 7, 8] and len(pictures) == 4
    body = {"prompt": "a fox", "seed": 6, "num_inference_steps": 2}
    answer = http.post("/v1/images/generations", json=body).json()["data"][0]["b64_json"]
    assert np.array_equal(pictures[1], np.asarray(Image.open(io.BytesIO(base64.b64decode(answer))).convert("RGB")))


def test_a_mask_repaints_what_is_white_or_with_invert_what_is_black(http: httpx.Client) -> None:
    (given,), _ = made(http, "txt2img", prompt="a rocket on a blue background", seed=3)
    mask = np.zeros((64, 64), np.uint8)
    mask[:, 32:] = 255
    fields = {
        "prompt": "a red apple on a blue background",
        "init_images": [f"data:image/png;base64,{encoded(given)}"],
        "mask": encoded(mask),
        "denoising_strength": 1.0,
        "seed": 3,
        "mask_blur": 4,
        "inpainting_fill": 1,
    }
    (right,), info = made(http, "img2img", **fields)
    (left,), _ = made(http, "img2img", **fields, inpainting_mask_invert=1)
    assert info["denoising_strength"] == 1.0
    assert np.array_equal(right[:, :28], given[:, :28]) and not np.array_equal(right[:, 32:], given[:, 32:])
    assert np.array_equal(left[:, 36:], given[:, 36:]) and not np.array_equal(left[:, :32], given[:, :32])


def test_the_model_is_set_by_its_title(http: httpx.Client) -> None:
    (model,) = http.get("/sdapi/v1/sd-models").json()
    assert http.post("/sdapi/v1/options", json={"sd_model_checkpoint": model["title"], "other": 1}).status_code == 200
    assert http.get("/sdapi/v1/options").json()["sd_model_checkpoint"] == model["title"]
    assert http.post("/sdapi/v1/options", json={"sd_model_checkpoint": "nope"}).status_code == 404
    _, info = made(http, "txt2img", prompt="a fox", override_settings={"sd_model_checkpoint": model["model_name"]})
    assert info["sd_model_name"] == "tdm-emoji"


def test_lists_have_what_clients_read(http: httpx.Client) -> None:
    lists = ["samplers", "schedulers", "loras", "upscalers", "latent-upscale-modes", "sd-vae", "sd-modules"]
    found = {name: http.get(f"/sdapi/v1/{name}").json() for name in lists}
    assert all(isinstance(entries, list) for entries in found.values())
    assert [sampler["name"] for sampler in found["samplers"]] == ["ddim"]
    progress = http.get("/sdapi/v1/progress").json()
    assert progress["progress"] == 0.0 and progress["state"]["job_count"] == 0


def test_interrupt_ends_what_runs(http: httpx.Client) -> None:
    answers: list[httpx.Response] = []

    def ask() -> None:
        body = {"prompt": "a fox", "batch_size": 10}
        answers.append(httpx.post(f"{http.base_url}/sdapi/v1/txt2img", json=body, timeout=60))

    asking = threading.Thread(target=ask)
    asking.start()
    while asking.is_alive() and not http.get("/sdapi/v1/progress").json()["state"]["job_count"]:
        pass
    http.post("/sdapi/v1/interrupt")
    asking.join()
    body = answers[0].json()
    # A fast machine may have been done before.
    assert answers[0].status_code == 200 and (len(body["images"]) in (0, 10))
    assert ("interrupted" in json.loads(body["info"])["warnings"]) == (not body["images"])


@pytest.mark.parametrize(
    ("route", "fields", "message"),
    [
        ("txt2img", {"prompt": ""}, "prompt is empty"),
        ("txt2img", {"prompt": "a", "batch_size": 11}, "batch_size x n_iter is 11; at most 10"),
        ("img2img", {"prompt": "a"}, "init_images is required"),
        ("img2img", {"prompt": "a", "init_images": ["http://example.com/a.png"]}, "no address is fetched"),
    ],
)
def test_what_cannot_be_made_is_refused(http: httpx.Client, route: str, fields: dict[str, Any], message: str) -> None:
    answer = http.post(f"/sdapi/v1/{route}", json=fields)
    assert answer.status_code == 400 and message in answer.json()["error"]["message"]


def test_a_key_may_come_as_the_password_of_basic_credentials(tmp_path: Any) -> None:
    file = tmp_path / "keys.json"
    save_keys(file, [APIKey("ui", hash_key("secret"))])
    access = Access(file)
    assert access.caller("Basic " + base64.b64encode(b"user:secret").decode()).name == "ui"
    for wrong in (base64.b64encode(b"secret").decode(), base64.b64encode(b"user:no").decode(), "%%%", ""):
        with pytest.raises(APIError) as refused:
            access.caller(f"Basic {wrong}")
        assert refused.value.status == 401
