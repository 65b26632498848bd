"""Valid requests become orders; everything else is a 400 that names the value and the limit."""

from __future__ import annotations

import json
import pickle
import random
import tracemalloc
from dataclasses import FrozenInstanceError, fields, is_dataclass, replace
from typing import Any

import pytest

from serving.errors import APIError, unknown_model
from serving.schema.batch_line import background_order, read_batch_line
from serving.schema.edit_request import edit_order_from_body
from serving.schema.image_request import MAX_PICTURES, ImageRequest, order_from_body, order_from_fields
from serving.schema.order import DeliveryOptions, ImageEncoding, ImageOrder
from serving.schema.parsing import parse_json, validate
from serving.schema.video_request import VideoGenerationRequest, VideoRequest
from tdm_runtime.checkpoint.folder import DEFAULT_CHECKPOINT
from tdm_runtime.checkpoint.recipe import Recipe, load_recipe
from tdm_runtime.errors import InvalidRequestError
from tdm_runtime.params import MAX_SEED

RECIPE = load_recipe(DEFAULT_CHECKPOINT)


def ordered(body: bytes) -> ImageOrder:
    return order_from_body(body, lambda name: RECIPE)


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
    ({"prompt": "a", "seed": -2}, "seed"),
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
    ({"prompt": "\u200b \u2060"}, "prompt"),
    ({"prompt": "a", "colour": None}, "colour"),
    ({"prompt": "a", "style": "loud"}, "style"),
    ({"prompt": "a", "lora_scale": 1}, "lora_scale"),
    ({"prompt": "a", "decoder": ["full", "tiny"]}, "decoder"),
    ({"prompt": "a", "colour": "blue"}, "colour"),
    ({"prompt": "a", "user": "u" * 257}, "user"),
]


@pytest.mark.parametrize(("body", "param"), BAD_REQUESTS)
def test_a_bad_value_is_refused_with_the_name_of_its_field(body: dict[str, Any], param: str) -> None:
    with pytest.raises((APIError, InvalidRequestError)) as caught:
        ordered(json.dumps(body).encode())
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
        ordered(body)


def test_brackets_inside_strings_are_not_nesting() -> None:
    text = "[" * 1000 + '"{'
    assert parse_json(json.dumps({"prompt": text}).encode()) == {"prompt": text}


def test_a_request_with_only_a_prompt_gets_the_recipes_defaults() -> None:
    order = ordered(b'{"prompt": "a cat"}')
    (params,) = order.pictures
    assert order == ImageOrder(RECIPE.name, (params,), DeliveryOptions(), ImageEncoding())
    assert params.num_inference_steps == RECIPE.default_steps
    assert (params.width, params.height) == RECIPE.native_sizes[0]
    assert 0 <= params.seed <= MAX_SEED
    assert params.decoder == "full"


@pytest.mark.parametrize("decoder", ["full", "tiny"])
def test_every_picture_of_a_request_has_its_decoder(decoder: str) -> None:
    body = {"prompt": "a cat", "n": 3, "decoder": decoder}
    params = ordered(json.dumps(body).encode()).pictures
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
def test_contradicting_fields_are_refused_with_the_name_of_one(body: dict[str, Any], param: str) -> None:
    with pytest.raises((APIError, InvalidRequestError)) as caught:
        ordered(json.dumps({"prompt": "a cat"} | body).encode())
    assert caught.value.param == param
    assert param in str(caught.value)


def test_auto_leaves_the_step_count_open_from_the_fewest_to_the_most() -> None:
    order = ordered(b'{"prompt": "a cat", "num_inference_steps": "auto", "latency_budget_ms": 40}')
    assert order.pictures[0].num_inference_steps == RECIPE.step_counts[-1]
    assert order.delivery == DeliveryOptions(latency_budget_ms=40.0, min_inference_steps=RECIPE.step_counts[0])


def test_an_order_has_the_options_of_its_request() -> None:
    body = {"prompt": "a cat", "stream": True, "partial_images": 3, "draft": True, "strict": True}
    order = ordered(json.dumps(body | {"output_format": "webp", "output_compression": 60, "metadata": False}).encode())
    assert order.delivery == DeliveryOptions(strict=True, is_streamed=True, num_previews=2, draft=True)
    assert order.encoding == ImageEncoding("webp", compression=60, metadata=False)
    assert ordered(b'{"prompt": "a cat", "response_format": "url"}').encoding.response_format == "url"


def test_the_error_of_an_unknown_step_word_names_auto() -> None:
    with pytest.raises(APIError, match=r"integer or .*'auto'"):
        ordered(b'{"prompt": "a", "num_inference_steps": "fast"}')


def test_each_picture_of_a_request_has_the_next_seed_and_seeds_wrap() -> None:
    body = {"prompt": "a cat", "n": 3, "seed": MAX_SEED}
    params = ordered(json.dumps(body).encode()).pictures
    assert [p.seed for p in params] == [MAX_SEED, 0, 1]


OPTIONAL = [name for name, field in ImageRequest.model_fields.items() if not field.is_required()]


def test_null_means_absent_in_every_field() -> None:
    body = {"prompt": "a cat", "seed": 7}
    nulls = dict.fromkeys(OPTIONAL) | body
    assert ordered(json.dumps(nulls).encode()) == ordered(json.dumps(body).encode())
    properties = ImageRequest.model_json_schema()["properties"]
    assert all({"type": "null"} in properties[name]["anyOf"] for name in OPTIONAL)


def test_null_means_absent_in_clips_and_in_lines_of_batches() -> None:
    fields = {"prompt": "a fox"}
    for kind in (VideoRequest, VideoGenerationRequest):
        nulls = dict.fromkeys(set(kind.model_fields) - {"prompt"})
        assert validate(nulls | fields, kind).model_dump() == validate(fields, kind).model_dump()
    line = {"custom_id": "a", "method": None, "url": None, "body": dict.fromkeys(OPTIONAL) | fields}
    read = read_batch_line(json.dumps(line).encode())
    assert background_order(read.url, read.body, lambda _: RECIPE, 7) == order_from_fields(fields, lambda _: RECIPE, 7)


@pytest.mark.parametrize(
    ("extra", "warning"),
    [
        ({}, ""),
        ({"moderation": "low", "safety_identifier": "x", "quality": "standard"}, ""),
        ({"guidance_scale": 0}, ""),
        ({"quality": "hd"}, "quality hd changes nothing; num_inference_steps is the quality dial"),
        ({"style": "vivid"}, "style vivid changes nothing"),
        ({"output_compression": 50}, "output_compression changes nothing in a png"),
        ({"output_compression": 50, "output_format": "webp"}, ""),
        ({"seed": MAX_SEED, "n": 2}, "the pictures after it go on from seed 0"),
        ({"seed": MAX_SEED}, ""),
        ({"prompt": "(sharp:1.3) cat"}, r"has (word:1.3), which is read as plain words; leave it out, or send"),
        ({"prompt": "cat <lora:ink:0.8> BREAK"}, "<lora:...> and BREAK, which is read as plain words; name a LoRA by"),
        ({"prompt": "a cat (a ragdoll, at 10:30)"}, ""),
    ],
)
def test_what_changes_nothing_is_accepted_and_named_in_a_warning(extra: dict[str, Any], warning: str) -> None:
    warnings = ordered(json.dumps({"prompt": "a cat", **extra}).encode()).warnings
    assert len(warnings) == bool(warning) and warning in "".join(warnings)


@pytest.mark.parametrize(
    ("field", "meant"),
    [
        ("steps", "num_inference_steps"),
        ("step", "num_inference_steps"),
        ("cfg_scale", "guidance_scale"),
        ("width", "size, such as"),
        ("height", "size, such as"),
        ("rng_seed", "seed"),
        ("mode", "num_inference_steps or latency_budget_ms"),
        ("loras", "model, which names a LoRA"),
    ],
)
def test_a_field_of_another_server_is_refused_with_the_one_meant(field: str, meant: str) -> None:
    with pytest.raises(APIError, match=rf"'{field}' is not a parameter; send {meant}"):
        ordered(json.dumps({"prompt": "a", field: 1}).encode())


def test_a_byte_order_mark_is_read() -> None:
    assert ordered(b'\xef\xbb\xbf{"prompt": "a", "seed": 1}') == ordered(b'{"prompt": "a", "seed": 1}')


@pytest.mark.parametrize("extra", [{"user": "u"}, {"quality": "auto"}, {"stream": False}, {"guidance_scale": 1}])
def test_what_official_clients_send_by_default_is_accepted(extra: dict[str, Any]) -> None:
    body = {"prompt": "a cat", "model": RECIPE.name, "size": "auto", **extra}
    assert len(ordered(json.dumps(body).encode()).pictures) == 1


@pytest.mark.parametrize("prompt", ["قلب أحمر", "赤いハート 🦋", "a\u202eb", "x" * 2000])
def test_any_unicode_text_is_a_prompt(prompt: str) -> None:
    (params,) = ordered(json.dumps({"prompt": prompt}).encode()).pictures
    assert params.prompt == prompt


# -- the order -------------------------------------------------------------------------------------


def test_the_seed_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []

    def draw(below: int) -> int:
        drawn.append(random.randrange(below))
        return drawn[-1]

    monkeypatch.setattr("secrets.randbelow", draw)
    order = ordered(b'{"prompt": "a cat", "n": 3}')
    assert [params.seed for params in order.pictures] == [(drawn[0] + n) % (MAX_SEED + 1) for n in range(3)]
    assert order_from_body(b'{"prompt": "a", "seed": 5}', lambda name: RECIPE, default_seed=6).pictures[0].seed == 5
    assert order_from_body(b'{"prompt": "a"}', lambda name: RECIPE, default_seed=6).pictures[0].seed == 6
    assert order_from_body(b'{"prompt": "a", "seed": -1}', lambda name: RECIPE, default_seed=6).pictures[0].seed == 6
    assert len(drawn) == 1


def test_an_order_is_frozen_and_equal_after_pickling() -> None:
    order = ordered(b'{"prompt": "a cat", "n": 2, "latency_budget_ms": 40}')
    assert pickle.loads(pickle.dumps(order)) == order
    assert hash(order) == hash(pickle.loads(pickle.dumps(order)))
    for part in (order, order.delivery, order.encoding, *order.pictures):
        assert is_dataclass(part)
        with pytest.raises(FrozenInstanceError):
            setattr(part, fields(part)[0].name, None)


def test_changing_an_order_leaves_its_other_fields() -> None:
    order = ordered(b'{"prompt": "a cat", "n": 2, "output_format": "jpeg", "strict": true}')
    changed = order.within(40.0).in_background().as_pixels()
    assert (changed.model, changed.pictures) == (order.model, order.pictures)
    assert changed.delivery == DeliveryOptions(latency_budget_ms=40.0, strict=True, is_background=True)
    assert changed.encoding == ImageEncoding("jpeg", pixels_only=True)


def test_an_order_with_auto_costs_the_most_steps() -> None:
    fields = {"prompt": "a cat", "num_inference_steps": "auto", "n": 3, "size": "64x64"}
    cost = order_from_fields(fields, lambda name: RECIPE).cost
    assert cost == pytest.approx(3 * 64 * 64 * RECIPE.step_counts[-1] / 1e6)


# -- prompt syntax ---------------------------------------------------------------------------------


def served(name: str | None) -> Recipe:
    """Recipes of a server with the LoRA "ink" on its model."""
    recipes = {None: RECIPE, RECIPE.name: RECIPE, "ink": replace(RECIPE, name="ink", lora_scale=1.0)}
    if name not in recipes:
        raise unknown_model(str(name), [RECIPE.name, "ink"])
    return recipes[name]


def weighted(prompt: str, **more: object) -> ImageOrder:
    return order_from_fields({"prompt": prompt, "prompt_syntax": "a1111", **more}, served)


def test_the_syntax_of_a_prompt_reaches_every_picture_and_gets_no_warning() -> None:
    order = weighted("a (red:1.3) cat BREAK [small]", n=2)
    assert {one.prompt_syntax for one in order.pictures} == {"a1111"} and order.warnings == ()
    assert order.pictures[0].prompt == "a (red:1.3) cat BREAK [small]"
    assert order_from_fields({"prompt": "a cat"}, served).pictures[0].prompt_syntax == "plain"


@pytest.mark.parametrize(("tag", "scale"), [("<lora:ink:0.8>", 0.8), ("<lora:ink>", None), ("<LoRA:ink:-1>", -1.0)])
def test_a_tag_in_a_prompt_chooses_the_served_lora(tag: str, scale: float | None) -> None:
    for more in ({}, {"model": "ink"}):
        order = weighted(f"a (red) cat {tag}", **more)
        assert (order.model, order.pictures[0].lora_scale) == ("ink", scale)
        assert order.pictures[0].prompt == "a (red) cat"


@pytest.mark.parametrize(
    ("prompt", "more", "param", "message"),
    [
        ("cat <lora:oil:1>", {}, "prompt", "names the LoRA 'oil': model 'oil' does not exist; this server has"),
        ("cat <lora:ink:1> <lora:ink:2>", {}, "prompt", "2 tags <lora:...>; a picture takes one LoRA"),
        (f"cat <lora:{RECIPE.name}:1>", {}, "prompt", "which is a model of its own here; name it by model"),
        ("cat <lora:ink:big>", {}, "prompt", "the scale of a LoRA in the prompt is 'big'; write one number"),
        ("cat <lora:ink:0.8:0.6>", {}, "prompt", "is '0.8:0.6'; write one number, as in <lora:name:0.8>"),
        ("cat <lora:ink:9>", {}, "lora_scale", "lora_scale is 9.0; it must be from -4 to 4"),
        ("cat <lora:ink:1>", {"lora_scale": 0.5}, "lora_scale", "lora_scale is 0.5 and the prompt has <lora:ink:1>"),
        ("cat <lora:ink:1>", {"model": RECIPE.name}, "model", "the prompt names the LoRA 'ink', a model too; leave"),
        ("<lora:ink:1>", {}, "prompt", "prompt is empty"),
    ],
)
def test_a_tag_that_cannot_be_served_is_refused(prompt: str, more: dict[str, object], param: str, message: str) -> None:
    with pytest.raises((APIError, InvalidRequestError)) as caught:
        weighted(prompt, **more)
    assert message in str(caught.value) and caught.value.param == param


# -- bodies with pictures --------------------------------------------------------------------------


def test_a_long_string_is_read_without_a_step_for_each_character() -> None:
    """Backtracking states of 4 MiB once took 600 MiB and three seconds, in which the engine stood still."""
    body = json.dumps({"prompt": "a", "image": "A" * 2**22}).encode()
    tracemalloc.start()
    try:
        assert len(parse_json(body)["image"]) == 2**22
        assert tracemalloc.get_traced_memory()[1] < 2**25
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("filling", ["[" * 5000, '"' * 5000, "{}" * 5000])
def test_a_picture_body_of_many_small_parts_is_refused_before_it_is_parsed(filling: str) -> None:
    body = json.dumps({"prompt": "a", "image": "", "user": filling}).encode()
    with pytest.raises(APIError, match="brackets and quotes; one that brings pictures has at most 4096"):
        edit_order_from_body(body, lambda name: RECIPE)
