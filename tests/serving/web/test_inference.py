"""The Open Inference Protocol over HTTP, beside gRPC and with KServe's own clients."""

from __future__ import annotations

import json
import struct
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest

from serving.rpc.protos import open_inference_pb2 as pb
from serving.rpc.protos import open_inference_pb2_grpc
from serving.schema.inference import OutputTensor
from serving.web import inference_schema
from tests.serving.conftest import RunningServer

KSERVE = Path(__file__).resolve().parents[3] / "build" / "kserve" / "bin" / "python"
CLIENT = Path(__file__).with_name("kserve_client.py")
MODEL = "/v2/models/tdm-emoji"
INFER = f"{MODEL}/infer"
LENGTH = "inference-header-content-length"
PROMPT = "a red heart"
RAW_PROMPT = struct.pack("<I", len(PROMPT)) + PROMPT.encode()

Inference = open_inference_pb2_grpc.GRPCInferenceServiceStub


@pytest.fixture(scope="module")
def inference(server: RunningServer) -> Iterator[Inference]:
    options = (("grpc.enable_http_proxy", 0),)
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}", options) as channel:
        yield Inference(channel)


def tensor(name: str, datatype: str, *data: Any, **fields: Any) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": [1], "data": [*data]} | fields


def binary(name: str, datatype: str, size: int) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": [1], "parameters": {"binary_data_size": size}}


PROMPT_TENSOR = tensor("prompt", "BYTES", PROMPT)
BINARY_PROMPT = binary("prompt", "BYTES", len(RAW_PROMPT))
STRICT = [PROMPT_TENSOR, tensor("seed", "INT64", 7), tensor("num_inference_steps", "INT32", 2)]


def body(*inputs: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"inputs": [*inputs], **fields}


def post_binary(http: httpx.Client, request: dict[str, Any], raw: bytes, length: str | None = None) -> httpx.Response:
    text = json.dumps(request).encode()
    headers = {LENGTH: length or str(len(text)), "content-type": "application/octet-stream"}
    return http.post(INFER, content=text + raw, headers=headers)


def grpc_request(request: dict[str, Any], model: str = "tdm-emoji") -> Any:
    """Return the same request as a message."""
    places = {"BYTES": "bytes_contents", "INT32": "int_contents", "INT64": "int64_contents"}
    message = pb.ModelInferRequest(model_name=model)
    for each in request["inputs"]:
        made = message.inputs.add(name=each["name"], datatype=each["datatype"], shape=each["shape"])
        values = [value.encode() if isinstance(value, str) else value for value in each["data"]]
        getattr(made.contents, places.get(each["datatype"], "uint_contents")).extend(values)
        for name in each.get("parameters", {}):
            made.parameters[name].string_param = "x"
    for name in request.get("outputs", ()):
        message.outputs.add(name=name["name"])
    for name, value in request.get("parameters", {}).items():
        kind = {bool: "bool_param", int: "int64_param", str: "string_param"}[type(value)]
        setattr(message.parameters[name], kind, value)
    return message


def test_json_and_binary_tensors_make_the_picture_of_grpc(http: httpx.Client, inference: Inference) -> None:
    strict = {"strict": True, "latency_budget_ms": 60_000}
    plain = http.post(INFER, json=body(*STRICT, parameters=strict, id="call-1"))
    assert plain.headers["content-type"] == "application/json"
    given = binary("seed", "UINT64", 8), BINARY_PROMPT, binary("num_inference_steps", "INT64", 8)
    raw = struct.pack("<Q", 7) + RAW_PROMPT + struct.pack("<q", 2)
    binary_answer = post_binary(http, body(*given, parameters=strict | {"binary_data_output": True}), raw)
    assert binary_answer.headers["content-type"] == "application/octet-stream"
    expected = inference.ModelInfer(grpc_request(body(*STRICT, parameters=strict)))
    about = [(output.name, output.datatype, list(output.shape)) for output in expected.outputs]

    answer = plain.json()
    assert (answer["id"], answer["model_name"], answer["model_version"]) == ("call-1", "tdm-emoji", "1")
    assert answer["parameters"].keys() == expected.parameters.keys() >= {"latency_budget_kept"}
    outputs = answer["outputs"]
    assert [(output["name"], output["datatype"], output["shape"]) for output in outputs] == about
    assert bytes(outputs[0]["data"]) == expected.raw_output_contents[0]
    assert [output["data"] for output in outputs[1:]] == [[7], [2]]

    end = int(binary_answer.headers[LENGTH])
    answer = json.loads(binary_answer.content[:end])
    assert "id" not in answer
    assert [(output["name"], output["datatype"], output["shape"]) for output in answer["outputs"]] == about
    sizes = [output["parameters"]["binary_data_size"] for output in answer["outputs"]]
    assert sizes == [64 * 64 * 3, 8, 4]
    assert binary_answer.content[end:] == b"".join(expected.raw_output_contents)


def test_each_output_is_binary_or_json_as_the_client_wants(http: httpx.Client) -> None:
    outputs = [{"name": "seed", "parameters": {"binary_data": False}}, {"name": "generated_image"}]
    asked = body(BINARY_PROMPT, outputs=outputs, parameters={"binary_data_output": True})
    answer = post_binary(http, asked, RAW_PROMPT)
    end = int(answer.headers[LENGTH])
    seed, picture = json.loads(answer.content[:end])["outputs"]
    assert (seed["name"], len(seed["data"])) == ("seed", 1)
    assert picture["name"] == "generated_image" and "data" not in picture
    assert len(answer.content) - end == picture["parameters"]["binary_data_size"] == 64 * 64 * 3
    asked = body(PROMPT_TENSOR, outputs=[{"name": "num_inference_steps"}], parameters={"num_inference_steps": 3})
    assert http.post(INFER, json=asked).json()["outputs"][0]["data"] == [3]


def test_a_picture_longer_than_a_row_of_text_is_written_whole() -> None:
    for size in (0, 1, inference_schema.ROW, inference_schema.ROW + 1):
        content = np.random.default_rng(0).integers(0, 256, size, np.uint8).tobytes()
        written = ",".join(inference_schema._written(OutputTensor("generated_image", "UINT8", [size], content)))
        assert json.loads(f"[{written}]") == list(content)


# -- refusals --------------------------------------------------------------------------------------


def error_of(answer: httpx.Response, status: int = 400) -> str:
    assert answer.status_code == status, answer.text
    assert answer.json().keys() == {"error"}
    message: str = answer.json()["error"]
    return message


@pytest.mark.parametrize(
    "request_",
    [
        body(),
        body(tensor("promt", "BYTES", "a")),
        body(tensor("prompt", "FP32", 1)),
        body(PROMPT_TENSOR | {"shape": [1, 1]}),
        body(PROMPT_TENSOR | {"shape": []}),
        body(PROMPT_TENSOR, PROMPT_TENSOR),
        body(PROMPT_TENSOR, tensor("seed", "INT64", -2)),
        body(PROMPT_TENSOR, tensor("num_inference_steps", "INT32", 9)),
        body(PROMPT_TENSOR | {"parameters": {"shared_memory_region": "x"}}),
        body(PROMPT_TENSOR, outputs=[{"name": "x"}]),
        body(PROMPT_TENSOR, parameters={"n": 2}),
        body(PROMPT_TENSOR, parameters={"strict": "yes"}),
        body(PROMPT_TENSOR, tensor("num_inference_steps", "INT32", 2), parameters={"num_inference_steps": 2}),
    ],
)
def test_both_transports_refuse_with_the_same_words(
    http: httpx.Client, inference: Inference, request_: dict[str, Any]
) -> None:
    message = error_of(http.post(INFER, json=request_))
    with pytest.raises(grpc.RpcError) as caught:
        inference.ModelInfer(grpc_request(request_))
    assert caught.value.details() == message


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (body(tensor("prompt", "BYTES")), "none; send one in data"),
        (body(tensor("prompt", "BYTES", "a", "b")), "2 in data"),
        (body(tensor("prompt", "BYTES", 5)), "5; BYTES needs text"),
        (body(tensor("prompt", "BYTES", ["a"])), "['a']; BYTES needs text"),
        (body(PROMPT_TENSOR, tensor("seed", "INT64", 7.5)), "7.5; INT64 needs a whole number"),
        (body(PROMPT_TENSOR, tensor("seed", "INT64", True)), "true; INT64 needs a whole number"),
        (body(PROMPT_TENSOR, tensor("num_inference_steps", "INT32", "auto")), "'auto'; INT32 needs a whole number"),
        (body(PROMPT_TENSOR | {"parameters": {"binary_data_size": 0}}), "send one of them"),
        (body(BINARY_PROMPT), "0 bytes are left"),
        (body(PROMPT_TENSOR, model_name="other"), "the path names 'tdm-emoji'"),
        (body(PROMPT_TENSOR, more=1), "'more' is not a parameter; known are id"),
        (body(PROMPT_TENSOR | {"more": 1}), "'more' is not a parameter; known are name"),
        (body(PROMPT_TENSOR, parameters={"binary_data_output": 1}), "binary_data_output is 1; send true or false"),
        (body(PROMPT_TENSOR, outputs=[{"name": "seed", "parameters": {"classification": 2}}]), "'classification' of"),
        ({"id": "x"}, "inputs is required"),
        ([PROMPT_TENSOR], "send an object"),
    ],
)
def test_wrong_json_is_named(http: httpx.Client, request_: Any, reason: str) -> None:
    assert reason in error_of(http.post(INFER, json=request_))


@pytest.mark.parametrize(
    ("size", "raw", "length", "reason"),
    [
        (len(RAW_PROMPT) + 1, RAW_PROMPT, None, f"{len(RAW_PROMPT)} bytes are left"),
        (-1, RAW_PROMPT, None, "-1; "),
        (len(RAW_PROMPT), RAW_PROMPT + b"\0", None, "1 bytes follow the inputs"),
        (3, b"\0\0\0", None, "its length as little-endian uint32"),
        (6, struct.pack("<I", 2) + b"\xff\xff", None, "not UTF-8 (byte 0)"),
        (len(RAW_PROMPT), RAW_PROMPT, "-1", "'-1'; send the number of bytes of JSON"),
        (len(RAW_PROMPT), RAW_PROMPT, "99999999", "'99999999'; send the number of bytes of JSON"),
        (len(RAW_PROMPT), RAW_PROMPT, "10", "the body is not JSON"),
    ],
)
def test_wrong_binary_tensor_data_is_named(
    http: httpx.Client, size: int, raw: bytes, length: str | None, reason: str
) -> None:
    assert reason in error_of(post_binary(http, body(binary("prompt", "BYTES", size)), raw, length))


def test_text_that_is_no_unicode_comes_back_escaped(http: httpx.Client) -> None:
    odd = "\ud800"
    bad = body(binary(odd, "BYTES", -1), id=odd)
    headers = {"content-type": "application/json"}
    assert "ud800" in error_of(http.post(INFER, content=json.dumps(bad), headers=headers))
    assert "ud800" in error_of(
        http.post(INFER, content=json.dumps(body(PROMPT_TENSOR, model_name=odd)), headers=headers)
    )
    answer = http.post(INFER, content=json.dumps(body(PROMPT_TENSOR, id=odd)), headers=headers)
    assert answer.json()["id"] == odd


def test_other_refusals_have_their_status(http: httpx.Client) -> None:
    request = body(PROMPT_TENSOR)
    assert "this server has tdm-emoji" in error_of(http.post("/v2/models/x/infer", json=request), 404)
    assert "tdm-emoji has 1" in error_of(http.post(f"{MODEL}/versions/2/infer", json=request), 404)
    assert "send application/json" in error_of(http.post(INFER, content=b"x", headers={"content-type": "a/b"}), 415)
    assert "larger than 16777216 bytes" in error_of(http.post(INFER, json=request | {"id": "x" * 17_000_000}), 413)
    assert "Method Not Allowed" in error_of(http.get(INFER), 405)
    assert "/openapi.json" in error_of(http.get("/v2/models"), 404)
    late = http.post(INFER, json=body(PROMPT_TENSOR, parameters={"latency_budget_ms": 0.01}))
    assert "raise the budget" in error_of(late)
    assert late.headers["x-should-retry"] == "false"


# -- health and metadata ---------------------------------------------------------------------------


def described(tensors: Iterable[Any]) -> list[dict[str, Any]]:
    return [{"name": each.name, "datatype": each.datatype, "shape": [*each.shape]} for each in tensors]


def test_health_and_metadata_equal_those_of_grpc(http: httpx.Client, inference: Inference) -> None:
    assert http.get("/v2/health/live").json() == {"live": True}
    assert http.get("/v2/health/ready").json() == {"ready": True}
    server = inference.ServerMetadata(pb.ServerMetadataRequest())
    expected = {"name": server.name, "version": server.version, "extensions": ["binary_tensor_data"]}
    assert http.get("/v2").json() == expected
    model = inference.ModelMetadata(pb.ModelMetadataRequest(name="tdm-emoji"))
    about = {"name": model.name, "versions": [*model.versions], "platform": model.platform}
    about |= {"inputs": described(model.inputs), "outputs": described(model.outputs)}
    for path in (MODEL, f"{MODEL}/versions/1"):
        assert http.get(path).json() == about
        assert http.get(f"{path}/ready").json() == {"name": "tdm-emoji", "ready": True}
        assert http.post(f"{path}/infer", json=body(PROMPT_TENSOR)).status_code == 200
    for path in ("/v2/models/x", "/v2/models/x/ready", f"{MODEL}/versions/0", f"{MODEL}/versions/0/ready"):
        error_of(http.get(path), 404)


# -- KServe's clients ------------------------------------------------------------------------------


@pytest.mark.skipif(not KSERVE.is_file(), reason="no KServe client; `make build/kserve/.installed` installs it")
def test_kserves_own_clients_get_one_picture_over_http_and_grpc(server: RunningServer, inference: Inference) -> None:
    command = [str(KSERVE), str(CLIENT), server.url, f"127.0.0.1:{server.grpc_port}", "tdm-emoji"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert (found["live"], found["ready"], found["model ready"], found["other ready"]) == (True, True, True, False)
    first, second = found["pictures"]
    for answers in (first, second):
        for way, answer in answers.items():
            assert (answer["id"], answer["shape"], answer["dtype"]) == ("call-1", [64, 64, 3], "uint8"), way
            assert answer["pixels"] == answers["json"]["pixels"], way
        assert len(answers["json"]["outputs"]) == 3
        assert answers["binary"]["outputs"] == answers["grpc"]["outputs"] == ["generated_image"]
    assert first["json"]["pixels"] != second["json"]["pixels"]
    expected = inference.ModelInfer(grpc_request(body(*STRICT, parameters={"strict": True})))
    assert bytes.fromhex(first["json"]["pixels"]) == expected.raw_output_contents[0]
