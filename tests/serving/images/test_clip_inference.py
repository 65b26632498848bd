"""Clips over the Open Inference Protocol: HTTP and gRPC give the frames and files of /v1/videos/generations."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import numpy as np
import pytest

from serving.rpc.protos import open_inference_pb2 as pb
from serving.rpc.protos import open_inference_pb2_grpc
from tdm_runtime.media.receipt import pixels_sha256
from tests.serving.images.conftest import Served

Inference = open_inference_pb2_grpc.GRPCInferenceServiceStub
INFER = "/v2/models/wan/infer"
LENGTH = "inference-header-content-length"
FIELDS = {"prompt": "a red fox runs", "seed": 7, "num_inference_steps": 2, "num_frames": 5, "fps": 10}
PARAMETERS = {"strict": True, "size": "32x64"}


@pytest.fixture(scope="module")
def inference(served: Served) -> Iterator[Inference]:
    options = (("grpc.max_receive_message_length", -1), ("grpc.enable_http_proxy", 0))
    with grpc.insecure_channel(f"127.0.0.1:{served.running.grpc_port}", options) as channel:
        yield Inference(channel)


def body(fields: dict[str, Any] = FIELDS, **more: Any) -> dict[str, Any]:
    """Return a request as JSON."""
    inputs = []
    for name, value in fields.items():
        datatype = "BYTES" if isinstance(value, str) else "INT64"
        inputs.append({"name": name, "datatype": datatype, "shape": [1], "data": [value]})
    return {"inputs": inputs, "parameters": PARAMETERS} | more


def message(fields: dict[str, Any] = FIELDS, model: str = "wan", outputs: tuple[str, ...] = ()) -> Any:
    """Return the same request as a message."""
    made = pb.ModelInferRequest(model_name=model)
    for name, value in fields.items():
        if isinstance(value, str):
            each = made.inputs.add(name=name, datatype="BYTES", shape=[1])
            each.contents.bytes_contents.append(value.encode())
        else:
            each = made.inputs.add(name=name, datatype="INT64", shape=[1])
            each.contents.int64_contents.append(value)
    made.parameters["strict"].bool_param = True
    made.parameters["size"].string_param = "32x64"
    for name in outputs:
        made.outputs.add(name=name)
    return made


def test_frames_equal_those_of_videos_over_both_transports(http: httpx.Client, inference: Inference) -> None:
    answer = http.post(INFER, json=body()).json()
    about = [(output["name"], output["datatype"], output["shape"]) for output in answer["outputs"]]
    assert about == [
        ("generated_clip", "UINT8", [5, 64, 32, 3]), ("seed", "INT64", [1]), ("num_inference_steps", "INT32", [1])
    ]  # fmt: skip
    frames = np.array(answer["outputs"][0]["data"], np.uint8).reshape(5, 64, 32, 3)
    wanted = http.post("/v1/videos/generations", json=FIELDS | PARAMETERS | {"model": "wan"}).json()
    assert pixels_sha256(frames) == wanted["data"][0]["receipt"]["pixels_sha256"]
    called = inference.ModelInfer(message())
    assert [(output.name, output.datatype, list(output.shape)) for output in called.outputs] == about
    assert called.raw_output_contents[0] == frames.tobytes()


def test_a_file_is_that_of_videos_and_needs_binary_data(http: httpx.Client, inference: Inference) -> None:
    fields = FIELDS | {"output_format": "webm"}
    wanted = http.post("/v1/videos/generations", json=fields | PARAMETERS | {"model": "wan"}).json()
    file = base64.b64decode(wanted["data"][0]["b64_json"])
    called = inference.ModelInfer(message(fields))
    assert [output.name for output in called.outputs] == ["encoded_clip", "seed", "num_inference_steps"]
    assert called.raw_output_contents[0] == struct.pack("<I", len(file)) + file
    asked = body(fields, outputs=[{"name": "encoded_clip", "parameters": {"binary_data": True}}])
    answer = http.post(INFER, json=asked)
    end = int(answer.headers[LENGTH])
    (output,) = json.loads(answer.content[:end])["outputs"]
    assert (output["datatype"], output["shape"]) == ("BYTES", [1])
    assert answer.content[end + 4 :] == file
    plain = http.post(INFER, json=body(fields))
    assert plain.status_code == 400 and "JSON cannot hold" in plain.json()["error"]


def test_metadata_names_the_tensors_of_clips(http: httpx.Client, inference: Inference) -> None:
    about = http.get("/v2/models/wan").json()
    assert {"name": "num_frames", "datatype": "INT32", "shape": [1]} in about["inputs"]
    assert [(output["name"], output["datatype"], output["shape"]) for output in about["outputs"][:2]] == [
        ("generated_clip", "UINT8", [-1, -1, -1, 3]), ("encoded_clip", "BYTES", [1])
    ]  # fmt: skip
    model = inference.ModelMetadata(pb.ModelMetadataRequest(name="wan"))
    for name in ("inputs", "outputs"):
        found = [{"name": t.name, "datatype": t.datatype, "shape": [*t.shape]} for t in getattr(model, name)]
        assert found == about[name]
    assert "num_frames" not in json.dumps(http.get("/v2/models/lcm").json())


@pytest.mark.parametrize(
    ("fields", "outputs", "reason"),
    [
        ({"num_frames": 10}, (), "4 k + 1 frames, at most 33: take 9"),
        ({"num_frames": 0}, (), "num_frames is 0"),
        ({"fps": 31}, (), "fps is 31"),
        ({"num_inference_steps": 9}, (), "num_inference_steps is 9"),
        ({"output_format": "png"}, (), "output_format is 'png'; a clip is raw, mp4, webm, webp, gif"),
        ({"negative_prompt": "a"}, (), "'negative_prompt' is no input; known are prompt"),
        ({}, ("encoded_clip",), "not made with output_format raw"),
        ({"output_format": "mp4"}, ("generated_clip",), "not made with output_format mp4"),
        ({}, ("generated_image",), "'generated_image' is no output; known are generated_clip"),
    ],
)
def test_both_transports_refuse_with_the_same_words(
    http: httpx.Client, inference: Inference, fields: dict[str, Any], outputs: tuple[str, ...], reason: str
) -> None:
    asked = body(FIELDS | fields, outputs=[{"name": name} for name in outputs])
    asked["parameters"] = PARAMETERS | {"binary_data_output": True}
    answer = http.post(INFER, json=asked)
    assert answer.status_code == 400 and reason in answer.json()["error"]
    with pytest.raises(grpc.RpcError) as refused:
        inference.ModelInfer(message(FIELDS | fields, outputs=outputs))
    error: Any = refused.value
    assert (error.code(), error.details()) == (grpc.StatusCode.INVALID_ARGUMENT, answer.json()["error"])


def test_a_model_of_pictures_refuses_the_tensors_of_clips(http: httpx.Client) -> None:
    answer = http.post("/v2/models/lcm/infer", json={"inputs": body()["inputs"]})
    assert answer.status_code == 400 and "'num_frames' is no input; known are prompt" in answer.json()["error"]
