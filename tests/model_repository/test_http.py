"""The Triton model for clients that cannot stream."""

from __future__ import annotations

import json
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from tritonclient.utils import InferenceServerException

from tdm_runtime import LoadedModel, SamplingParams, generate
from tests.model_repository.clients import ask_http
from tests.model_repository.triton_server import TritonServer


def test_http_clients_get_pictures_side_by_side(triton: TritonServer, reference: LoadedModel) -> None:
    before = triton.read_metrics()
    with ThreadPoolExecutor(16) as pool:
        made = list(
            pool.map(
                lambda n: ask_http(triton.http, prompt="a cat", seed=n, num_inference_steps=1 + n % 4, strict=True),
                range(32),
            )
        )
    for seed, picture in enumerate(made):
        params = SamplingParams("a cat", seed, 1 + seed % 4, 16, 16)
        assert np.array_equal(picture["generated_image"], generate(reference, params))
    after = triton.read_metrics()
    assert after["tdm_finished_total"] - before["tdm_finished_total"] == 32


def test_plain_json_without_a_client_library_works(triton: TritonServer) -> None:
    inputs = [
        {"name": "prompt", "datatype": "BYTES", "shape": [1], "data": ["a cat"]},
        {"name": "output_format", "datatype": "BYTES", "shape": [1], "data": ["png"]},
    ]
    request = urllib.request.Request(
        f"http://{triton.http}/v2/models/tdm_http/infer", json.dumps({"inputs": inputs[:1]}).encode()
    )
    with urllib.request.urlopen(request) as answer:
        outputs = {output["name"]: output for output in json.load(answer)["outputs"]}
    assert outputs["generated_image"]["shape"] == [16, 16, 3]


def test_a_refusal_has_its_message_and_status(triton: TritonServer) -> None:
    with pytest.raises(InferenceServerException, match="num_inference_steps is 9; tdm-emoji serves") as refused:
        ask_http(triton.http, prompt="a cat", num_inference_steps=9)
    assert refused.value.status() == "400"
