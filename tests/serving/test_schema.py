"""What a client may send: everything else is a 400 that names value and limit."""

from __future__ import annotations

import json
from typing import Any

import pytest

from serving.errors import APIError
from serving.schema.images import MAX_PICTURES, ImageRequest
from serving.schema.parsing import parse_body, parse_json
from tdm_runtime.checkpoint import DEFAULT_CHECKPOINT
from tdm_runtime.delivery import Delivery
from tdm_runtime.errors import InvalidRequestError
from tdm_runtime.params import MAX_SEED
from tdm_runtime.recipe import load_recipe

RECIPE = load_recipe(DEFAULT_CHECKPOINT)


def parsed(body: bytes) -> ImageRequest:
    return parse_body(body, ImageRequest)


NO_BODY: dict[str, Any] = {}

BAD_REQUESTS: list[tuple[dict[str, Any], str]] = [
    (NO_BODY, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": " \t\n"}, "prompt"),
    ({"prompt": "x" * 2001}, "prompt"),
    ({"prompt": "nul \0"}, "prompt"),
    ({"prompt": 7}, "prompt"),
    ({"prompt": ["a", "b"]}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": "a", "n": 0}, "n"),
    ({"prompt": "a", "n": MAX_PICTURES + 1}, "n"),
    ({"prompt": "a", "n": 10**9}, "n"),
    ({"prompt": "a", "n": True}, "n"),
    ({"prompt": "a", "n": 1.0}, "n"),
    ({"prompt": "a", "num_inference_steps": 0}, "num_inference_steps"),
    ({"prompt": "a", "num_inference_steps": 10**6}, "num_inference_steps"),
    ({"prompt": "a", "num_inference_steps": True}, "num_inference_steps"),
    ({"prompt": "a", "num_inference_steps": "4"}, "num_inference_steps"),
    ({"prompt": "a", "num_inference_steps": "AUTO"}, "num_inference_steps"),
    ({"prompt": "a", "num_inference_steps": "auto", "min_inference_steps": True}, "min_inference_steps"),
    ({"prompt": "a", "latency_budget_ms": 0}, "latency_budget_ms"),
    ({"prompt": "a", "latency_budget_ms": -5}, "latency_budget_ms"),
    ({"prompt": "a", "latency_budget_ms": 1e9}, "latency_budget_ms"),
    ({"prompt": "a", "latency_budget_ms": "40"}, "latency_budget_ms"),
    ({"prompt": "a", "stream": "yes"}, "stream"),
    ({"prompt": "a", "stream": True, "partial_images": 4}, "partial_images"),
    ({"prompt": "a", "strict": 1}, "strict"),
    ({"prompt": "a", "guidance_scale": 7.5}, "guidance_scale"),
    ({"prompt": "a", "guidance_scale": 1e308}, "guidance_scale"),
    ({"prompt": "a", "negative_prompt": "blurry"}, "negative_prompt"),
    ({"prompt": "a", "seed": -1}, "seed"),
    ({"prompt": "a", "seed": MAX_SEED + 1}, "seed"),
    ({"prompt": "a", "seed": 2**53}, "seed"),
    ({"prompt": "a", "seed": 2**64}, "seed"),
    ({"prompt": "a", "seed": 1.5}, "seed"),
    ({"prompt": "a", "seed": "7"}, "seed"),
    ({"prompt": "a", "size": "64"}, "size"),
    ({"prompt": "a", "size": "64x"}, "size"),
    ({"prompt": "a", "size": "0x0"}, "size"),
    ({"prompt": "a", "size": "-64x64"}, "size"),
    ({"prompt": "a", "size": "６４x６４"}, "size"),  # noqa: RUF001
    ({"prompt": "a", "size": "1e3x1e3"}, "size"),
    ({"prompt": "a", "size": "65536x65536"}, "size"),
    ({"prompt": "a", "size": "63x64"}, "size"),
    ({"prompt": "a", "size": "1024x1024"}, "size"),
    ({"prompt": "a", "response_format": "base64"}, "response_format"),
    ({"prompt": "a", "output_format": "gif"}, "output_format"),
    ({"prompt": "a", "output_compression": 101}, "output_compression"),
    ({"prompt": "a", "decoder": "jpeg"}, "decoder"),
    ({"prompt": "a", "decoder": "Tiny"}, "decoder"),
    ({"prompt": "a", "decoder": None}, "decoder"),
    ({"prompt": "a", "decoder": ["full", "tiny"]}, "decoder"),
    ({"prompt": "a", "colour": "blue"}, "colour"),
    ({"prompt": "a", "user": "u" * 257}, "user"),
]


@pytest.mark.parametrize(("body", "param"), BAD_REQUESTS)
def test_a_bad_value_is_refused_by_name(body: dict[str, Any], param: str) -> None:
    with pytest.raises((APIError, InvalidRequestError)) as caught:
        parsed(json.dumps(body).encode()).to_sampling_params(RECIPE)
    assert caught.value.param == param
    assert param in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"nonsense",
        b"[]",
        b'"prompt"',
        b"null",
        b'{"prompt": "a",}',
        b'{"prompt": "a", "prompt": "b"}',
        b'{"prompt": "a", "guidance_scale": NaN}',
        b'{"prompt": "a", "guidance_scale": Infinity}',
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "\\ud800"}',
        b'{"a":' * 10000 + b"1" + b"}" * 10000,
        b"[" * 60000,
        b'{"seed": ' + b"9" * 10000 + b"}",
    ],
)
def test_a_body_that_is_not_one_plain_json_object_is_refused(body: bytes) -> None:
    with pytest.raises((APIError, InvalidRequestError)):
        parsed(body).to_sampling_params(RECIPE)


def test_brackets_inside_strings_are_not_nesting() -> None:
    text = "[" * 1000 + '"{'
    assert parse_json(json.dumps({"prompt": text}).encode()) == {"prompt": text}


def test_the_least_request_gets_the_recipes_defaults() -> None:
    (params,) = parsed(b'{"prompt": "a cat"}').to_sampling_params(RECIPE)
    assert params.num_inference_steps == RECIPE.default_steps
    assert (params.width, params.height) == RECIPE.native_sizes[0]
    assert 0 <= params.seed <= MAX_SEED
    assert params.decoder == "full"


@pytest.mark.parametrize("decoder", ["full", "tiny"])
def test_every_picture_of_a_request_has_its_decoder(decoder: str) -> None:
    body = {"prompt": "a cat", "n": 3, "decoder": decoder}
    params = parsed(json.dumps(body).encode()).to_sampling_params(RECIPE)
    assert [p.decoder for p in params] == [decoder] * 3


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"min_inference_steps": 2}, "min_inference_steps"),
        ({"num_inference_steps": 4, "min_inference_steps": 2}, "min_inference_steps"),
        ({"partial_images": 2}, "partial_images"),
        ({"stream": True, "draft": True}, "draft"),
        ({"stream": True, "n": 2}, "n"),
    ],
)
def test_fields_that_contradict_each_other_are_refused_by_name(body: dict[str, Any], param: str) -> None:
    request = parsed(json.dumps({"prompt": "a cat"} | body).encode())
    with pytest.raises((APIError, InvalidRequestError)) as caught:
        request.to_delivery(RECIPE, 0.0, lambda preview: None)
    assert caught.value.param == param
    assert param in str(caught.value)


def test_auto_leaves_the_step_count_open_from_the_fewest_to_the_most() -> None:
    request = parsed(b'{"prompt": "a cat", "num_inference_steps": "auto", "latency_budget_ms": 40}')
    (params,) = request.to_sampling_params(RECIPE)
    delivery = request.to_delivery(RECIPE, 10.0, None)
    assert params.num_inference_steps == RECIPE.step_counts[-1]
    assert delivery.min_inference_steps == RECIPE.step_counts[0]
    assert (delivery.latency_budget_ms, delivery.encoding_ms) == (40.0, 10.0)


def test_a_plain_request_promises_nothing_and_shows_nothing() -> None:
    delivery = parsed(b'{"prompt": "a cat"}').to_delivery(RECIPE, 10.0, lambda preview: None)
    assert delivery == Delivery()


def test_a_word_that_is_no_step_count_is_told_which_word_is() -> None:
    with pytest.raises(APIError, match=r"integer or .*'auto'"):
        parsed(b'{"prompt": "a", "num_inference_steps": "fast"}')


def test_the_pictures_of_a_request_count_seeds_up_and_wrap() -> None:
    body = {"prompt": "a cat", "n": 3, "seed": MAX_SEED}
    params = parsed(json.dumps(body).encode()).to_sampling_params(RECIPE)
    assert [p.seed for p in params] == [MAX_SEED, 0, 1]


@pytest.mark.parametrize("extra", [{"user": "u"}, {"quality": "auto"}, {"stream": False}, {"guidance_scale": 1}])
def test_what_official_clients_send_by_default_is_accepted(extra: dict[str, Any]) -> None:
    body = {"prompt": "a cat", "model": RECIPE.name, "size": "auto", **extra}
    assert len(parsed(json.dumps(body).encode()).to_sampling_params(RECIPE)) == 1


@pytest.mark.parametrize("prompt", ["قلب أحمر", "赤いハート 🦋", "a\u202eb", "x" * 2000])
def test_any_unicode_text_is_a_prompt(prompt: str) -> None:
    (params,) = parsed(json.dumps({"prompt": prompt}).encode()).to_sampling_params(RECIPE)
    assert params.prompt == prompt
