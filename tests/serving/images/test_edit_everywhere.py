"""Edits in batches and over the Open Inference Protocol have the pixels of the library."""

from __future__ import annotations

import base64
import io
import json
import struct
import time
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from serving.rpc.protos import open_inference_pb2 as pb
from serving.rpc.protos import open_inference_pb2_grpc
from tdm_runtime.edit import Edit
from tdm_runtime.model.choice import load_model
from tdm_runtime.model.loaded_model import LoadedModel
from tdm_runtime.params import SamplingParams
from tdm_runtime.pipeline import generate
from tests.serving.images.conftest import Served

PROMPT = "a (red:1.3) fox"
LEVELS = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
CHANGES = np.zeros((64, 64), np.uint8)
CHANGES[:, 32:] = 255


def file_of(pixels: NDArray[np.uint8]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


IMAGE, MASK = file_of(LEVELS), file_of(CHANGES)


@pytest.fixture(scope="module")
def lcm(served: Served) -> LoadedModel:
    return load_model(served.folders["lcm"], device="cpu")


def wanted(model: LoadedModel, edit: Edit | None) -> NDArray[np.uint8]:
    return generate(model, SamplingParams(PROMPT, 7, 4, 64, 64, edit=edit, prompt_syntax="a1111"))


def encoded(content: bytes) -> str:
    return base64.b64encode(content).decode()


def test_lines_of_a_batch(http: httpx.Client, lcm: LoadedModel) -> None:
    body = {"prompt": PROMPT, "prompt_syntax": "a1111", "seed": 7, "num_inference_steps": 4, "strict": True}
    body |= {"model": "lcm"}
    edit = body | {"image": encoded(IMAGE)}
    edits, bodies = "/v1/images/edits", [edit | {"strength": 0.5}, edit | {"mask": encoded(MASK)}]
    requests: list[dict[str, Any]] = [{"custom_id": str(n), "url": edits, "body": one} for n, one in enumerate(bodies)]
    requests.append({"custom_id": "made", "url": "/v1/images/generations", "body": body})
    batch = http.post("/v1/batches", json={"requests": requests}).json()
    deadline_s = time.monotonic() + 60
    while batch["status"] == "in_progress" and time.monotonic() < deadline_s:
        time.sleep(0.1)
        batch = http.get(f"/v1/batches/{batch['id']}").json()
    assert batch["endpoint"] == edits
    lines = http.get(f"/v1/files/{batch['output_file_id']}/content").text.splitlines()
    for line, each in zip(lines, [Edit(LEVELS, 0.5), Edit(LEVELS, 1.0, CHANGES), None], strict=True):
        (made,) = json.loads(line)["response"]["body"]["data"]
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(made["b64_json"]))))
        assert np.array_equal(pixels, wanted(lcm, each))


def test_tensors_over_http_and_grpc(http: httpx.Client, lcm: LoadedModel, served: Served) -> None:
    """Files come in base64 in JSON, as bytes after it, and as bytes over gRPC."""
    texts = {"prompt": PROMPT.encode(), "image": IMAGE, "mask": MASK}
    about = {"datatype": "BYTES", "shape": [1]}
    numbers = [
        {"name": "seed", "datatype": "INT64", "shape": [1], "data": [7]},
        {"name": "num_inference_steps", "datatype": "INT32", "shape": [1], "data": [4]},
    ]
    parameters = {"strict": True, "strength": 0.75, "prompt_syntax": "a1111"}
    expected = wanted(lcm, Edit(LEVELS, 0.75, CHANGES))

    in_json = [{"name": name, **about, "data": [encoded(file)]} for name, file in list(texts.items())[1:]]
    in_json += [{"name": "prompt", **about, "data": [PROMPT]}, *numbers]
    answer = http.post("/v2/models/lcm/infer", json={"inputs": in_json, "parameters": parameters})
    assert answer.json()["outputs"][0]["data"] == expected.ravel().tolist(), answer.text[:500]

    raw = [struct.pack("<I", len(content)) + content for content in texts.values()]
    sizes = [{"binary_data_size": len(one)} for one in raw]
    behind = [{"name": name, **about, "parameters": size} for name, size in zip(texts, sizes, strict=True)]
    head = json.dumps({"inputs": [*behind, *numbers], "parameters": parameters}).encode()
    headers = {"inference-header-content-length": str(len(head)), "content-type": "application/octet-stream"}
    answer = http.post("/v2/models/lcm/infer", content=b"".join([head, *raw]), headers=headers)
    assert answer.json()["outputs"][0]["data"] == expected.ravel().tolist()

    request = pb.ModelInferRequest(model_name="lcm")
    for name, content in texts.items():
        request.inputs.add(name=name, **about).contents.bytes_contents.append(content)
    request.inputs.add(name="seed", datatype="INT64", shape=[1]).contents.int64_contents.append(7)
    request.inputs.add(name="num_inference_steps", datatype="INT32", shape=[1]).contents.int_contents.append(4)
    request.parameters["strict"].bool_param = True
    request.parameters["strength"].double_param = 0.75
    request.parameters["prompt_syntax"].string_param = "a1111"
    with grpc.insecure_channel(f"127.0.0.1:{served.running.grpc_port}", (("grpc.enable_http_proxy", 0),)) as channel:
        called = open_inference_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request)
    assert called.raw_output_contents[0] == expected.tobytes()


def test_refusals_name_the_tensor(http: httpx.Client) -> None:
    def error(model: str = "lcm", **changes: Any) -> str:
        inputs = [{"name": "prompt", "datatype": "BYTES", "shape": [1], "data": [PROMPT]}]
        inputs += [{"name": name, "datatype": "BYTES", "shape": [1], "data": [text]} for name, text in changes.items()]
        answer = http.post(f"/v2/models/{model}/infer", json={"inputs": inputs})
        assert answer.status_code == 400
        return str(answer.json()["error"])

    assert "image is no base64" in error(image="?")
    assert "image is no file of PNG" in error(image=encoded(b"no picture"))
    assert "image is required" in error(mask=encoded(MASK))
    assert "'image' is no input" in error("wan", image=encoded(IMAGE))
