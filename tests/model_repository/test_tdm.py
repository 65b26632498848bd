"""The streaming Triton model: pictures, previews, refusals, cancellation."""

from __future__ import annotations

import io
import itertools
import json
import random
import re
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
from PIL import Image

from tdm_runtime import LoadedModel, SamplingParams, generate
from tdm_runtime.edit import Edit
from tests.model_repository.clients import Answer, ask, stream_to, tensors
from tests.model_repository.conftest import WORD
from tests.model_repository.triton_server import TritonServer

BODY: dict[str, Any] = {"prompt": "a red heart", "seed": 7, "num_inference_steps": 2}
SLOW = BODY | {"num_inference_steps": 4, "strict": True}
"""Shares no call."""


def test_pictures_in_flight_together_have_the_bits_of_generate(triton: TritonServer, reference: LoadedModel) -> None:
    wanted = {}
    for n, (steps, size) in zip(range(32), itertools.cycle(itertools.product((1, 2, 3, 4), ((16, 16), (24, 16))))):
        wanted[str(n)] = SamplingParams(f"a prompt {n % 5}", 2**32 - 1 - n, steps, *size)
    with stream_to(triton.grpc) as stream:
        for request_id, params in wanted.items():
            size = f"{params.width}x{params.height}"
            fields = {"prompt": params.prompt, "seed": params.seed, "num_inference_steps": params.num_inference_steps}
            stream.send(fields | {"size": size, "strict": True}, request_id)
        answers = stream.receive()
    for request_id, params in wanted.items():
        picture = answers[request_id].picture
        assert np.array_equal(picture["generated_image"], generate(reference, params)), params
        assert picture["num_inference_steps"] == params.num_inference_steps
        assert json.loads(picture["receipt"])["is_strict"]


def test_requests_join_between_steps_and_share_calls(triton: TritonServer) -> None:
    before = triton.read_metrics()
    with stream_to(triton.grpc) as stream:
        for n in range(24):
            stream.send(BODY | {"seed": n, "num_inference_steps": 1 + n % 4}, str(n))
        answers = stream.receive()
    assert all(answer.error is None for answer in answers.values())
    after = triton.read_metrics()
    calls, samples = (after[name] - before[name] for name in ("tdm_denoiser_calls_total", "tdm_sample_steps_total"))
    assert samples == 24 * 2.5
    assert calls < samples
    assert after["tdm_finished_total"] - before["tdm_finished_total"] == 24
    assert after["tdm_live"] == 0


def test_previews_come_before_the_picture(triton: TritonServer) -> None:
    answer = ask(triton.grpc, **BODY | {"num_inference_steps": 4, "previews": True})
    assert [response["is_preview"] for response in answer.responses] == [True, True, True, False]
    assert [response["num_inference_steps"] for response in answer.responses] == [1, 2, 3, 4]
    assert not np.array_equal(answer.responses[0]["generated_image"], answer.picture["generated_image"])


def test_previews_of_requests_in_flight_together_keep_their_order(triton: TritonServer) -> None:
    """Several threads encode and send them."""
    fields = BODY | {"num_inference_steps": 4, "previews": True, "output_format": "webp"}
    with stream_to(triton.grpc) as stream:
        for n in range(48):
            stream.send(fields | {"seed": n}, str(n))
        answers = stream.receive()
    for answer in answers.values():
        assert [response["num_inference_steps"] for response in answer.responses] == [1, 2, 3, 4]
        assert [response["is_preview"] for response in answer.responses] == [True, True, True, False]


def file_of(pixels: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


LEVELS = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
CHANGES = np.zeros((16, 24), np.uint8)
CHANGES[:, 12:] = 255
GIVEN, MASK = file_of(LEVELS), file_of(CHANGES)


@pytest.mark.parametrize("masked", [False, True])
def test_an_edit_of_weighted_words_has_the_bits_of_generate(
    triton: TritonServer, reference: LoadedModel, masked: bool
) -> None:
    """The size is the one nearest to the given picture's."""
    fields = {"prompt": "a (red:1.4) heart", "prompt_syntax": "a1111", "image": GIVEN, "strict": True, "previews": True}
    fields |= {"mask": MASK} if masked else {"strength": 0.5}
    answer = ask(triton.grpc, **BODY | fields | {"num_inference_steps": 4})
    edit = Edit(LEVELS, 1.0, CHANGES) if masked else Edit(LEVELS, 0.5)
    params = SamplingParams("a (red:1.4) heart", 7, 4, 24, 16, edit=edit, prompt_syntax="a1111")
    assert np.array_equal(answer.picture["generated_image"], generate(reference, params))
    assert len(answer.responses) == (4 if masked else 2)
    assert json.loads(answer.picture["receipt"])["edit_sha256"] == edit.digest


@pytest.mark.parametrize("image_format", ["png", "webp", "jpeg"])
def test_a_file_holds_the_picture_and_its_parameters(
    triton: TritonServer, reference: LoadedModel, image_format: str
) -> None:
    picture = ask(triton.grpc, **BODY | {"output_format": image_format}).picture
    with Image.open(io.BytesIO(picture["encoded_image"])) as file:
        assert file.format == image_format.upper()
        shown = np.asarray(file.convert("RGB")).astype(int)
    made = generate(reference, SamplingParams("a red heart", 7, 2, 16, 16)).astype(int)
    assert np.abs(shown - made).max() <= (2 if image_format != "jpeg" else 40)
    assert "generated_image" not in picture


def test_steps_are_chosen_by_budget_and_seeds_drawn(triton: TritonServer) -> None:
    first, second = (ask(triton.grpc, prompt="a red heart", latency_budget_ms=30_000).picture for _ in range(2))
    assert first["num_inference_steps"] == 4
    assert first["seed"] != second["seed"]
    assert first["predicted_ms"] > 0


BAD = {  # errors within a stream have a message and no status
    "prompt": (" ", "prompt is empty"),
    "negative_prompt": ("blurry", "negative_prompt needs guidance"),
    "seed": (2**32, "seed is 4294967296; it must be a whole number from 0 to 4294967295"),
    "num_inference_steps": (9, "num_inference_steps is 9; tdm-emoji serves 1, 2, 3, 4"),
    "latency_budget_ms": (-1.0, "latency_budget_ms is -1.0; it must be a positive number"),
    "size": ("17x16", "size is 17x16; tdm-emoji makes 16x16, 24x16"),
    "prompt_syntax": ("compel", "prompt_syntax is 'compel'; it must be plain or a1111"),
    "image": (b"no picture", "image is no file of PNG"),
    "mask": (MASK, "mask and strength are about image, which is missing"),
    "strength": (0.5, "mask and strength are about image, which is missing"),
    "guidance_scale": (7.5, "guidance_scale is 7.5; tdm-emoji has guidance distilled in"),
    "output_format": ("mp4", "output_format is 'mp4'; tdm-emoji makes pictures: raw, png, webp, jpeg"),
    "num_frames": (5, "num_frames is 5; tdm-emoji makes pictures, not clips: leave it out"),
    "fps": (5, "fps is 5; tdm-emoji makes pictures, not clips: leave it out"),
    "previews": ([True, False], "previews has the shape [2]; it must be [1]"),
    "strict": ([True, False], "strict has the shape [2]; it must be [1]"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_value_is_refused_with_its_limits(triton: TritonServer, name: str) -> None:
    value, message = BAD[name]
    error = ask(triton.grpc, **BODY | {name: value}).error
    assert message in error.message()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": f"a {WORD} thing"}, "the prompt holds a word that this server does not draw"),
        ({"prompt": b"\xff\xfe"}, "prompt is not UTF-8 at byte 0"),
        ({"size": "huge"}, "size is 'huge'; write WIDTHxHEIGHT"),
        ({"latency_budget_ms": float("nan")}, "latency_budget_ms is nan"),
        ({"prompt": "x" * 10_000}, "prompt has 10000 characters; at most 2000 are read"),
    ],
)
def test_hostile_values_are_refused(triton: TritonServer, fields: dict[str, Any], message: str) -> None:
    error = ask(triton.grpc, **BODY | fields).error
    assert message in error.message()


def test_a_budget_out_of_reach_names_the_least_budget(triton: TritonServer) -> None:
    error = ask(triton.grpc, **BODY | {"latency_budget_ms": 0.01}).error
    assert re.search(r"raise the budget to at least [0-9.]+ ms", error.message())


def test_a_full_queue_refuses_and_names_the_wait(triton: TritonServer) -> None:
    with triton_grpc.InferenceServerClient(triton.grpc) as client:
        arrived: list[Any] = []
        client.start_stream(lambda result, error: arrived.append(error))
        for n in range(400):
            client.async_stream_infer("tdm", tensors(SLOW | {"seed": n}))
        while len(arrived) < 400:
            time.sleep(0.01)
        client.stop_stream()
    refused = [error for error in arrived if error is not None]
    assert refused, "64 requests may be live, and 400 were sent at once"
    assert all("retry in" in error.message() for error in refused)
    assert ask(triton.grpc, **BODY).picture["seed"] == 7


def test_a_cancelled_request_stops_between_steps(triton: TritonServer) -> None:
    before, deadline_s = triton.read_metrics(), time.monotonic() + 60
    ended = ("tdm_finished_total", "tdm_cancelled_total")

    def wait_for(names: Sequence[str]) -> dict[str, float]:
        while sum((after := triton.read_metrics())[name] - before[name] for name in names) < 60:
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        return after

    with stream_to(triton.grpc) as stream:
        for n in range(60):
            stream.send(SLOW | {"seed": n}, str(n))
        wait_for((*ended, "tdm_live"))  # requests that have not arrived when the stream ends never do
    after = wait_for(ended)
    assert after["tdm_live"] == 0
    assert after["tdm_cancelled_total"] > before["tdm_cancelled_total"]


def test_an_answer_of_a_failed_request_is_final(triton: TritonServer) -> None:
    answer: Answer = ask(triton.grpc, **BODY | {"num_inference_steps": 5})
    assert answer.error is not None
    assert not answer.responses


def test_random_cancels_leave_memory_threads_and_shared_memory_as_they_were(triton: TritonServer) -> None:
    chance = random.Random(0)

    def storm(requests: int) -> None:
        for _ in range(requests // 20):
            with stream_to(triton.grpc) as stream:
                for n in range(20):
                    stream.send(BODY | {"seed": n, "num_inference_steps": 4}, str(n))
                if chance.random() < 0.5:
                    stream.receive()
                else:
                    time.sleep(0.02 * chance.random())  # leaving the stream cancels what is unfinished
        ask(triton.grpc, **BODY)

    storm(100)
    before = triton.read_usage()
    storm(200)
    after = triton.read_usage()
    assert after["threads"] <= before["threads"] + 2
    assert after["shared_mib"] <= before["shared_mib"] + 1
    assert after["resident_mib"] <= before["resident_mib"] + 40
