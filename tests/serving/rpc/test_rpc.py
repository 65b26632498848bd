"""gRPC: first against a real server, then the edge in this process with a tiny checkpoint."""

from __future__ import annotations

import asyncio
import base64
import importlib.metadata
import io
import re
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from PIL import Image
from pydantic import BaseModel

from benchmarks.cli import main as tdm_bench
from serving.command.cli import main as tdm_serve
from serving.config import ModelSource, ServerConfig
from serving.fronts.access import APIKey, draw_key, hash_key, save_keys
from serving.fronts.services import Services
from serving.images.local import ImageService
from serving.rpc import calls
from serving.rpc import grpc_edge as edge
from serving.rpc.grpc_front import GRPCFront
from serving.rpc.protos import images_pb2 as pb
from serving.rpc.protos import images_pb2_grpc, open_inference_pb2, open_inference_pb2_grpc
from serving.rpc.statuses import printable
from serving.schema.edit_request import EditRequest
from serving.schema.video_request import VideoGenerationRequest
from serving.telemetry.metrics import ServerMetrics
from tdm_runtime.model.artifacts import BackendConfig
from tests.ports import free_port
from tests.serving.conftest import RunningServer, wait_until

Code = grpc.StatusCode
PROTOS = Path(images_pb2_grpc.__file__).parent
OPTIONS = (("grpc.enable_http_proxy", 0),)
NO_BUDGET = (calls.NO_DEADLINE_BUDGET,)
PROMPT = "a red heart"
LONG_S = 60.0
"""A deadline that any machine can meet."""


@pytest.fixture(scope="module")
def channel(server: RunningServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}", OPTIONS) as opened:
        yield opened


@pytest.fixture(scope="module")
def images(channel: grpc.Channel) -> images_pb2_grpc.ImageServiceStub:
    return images_pb2_grpc.ImageServiceStub(channel)


@pytest.fixture(scope="module")
def inference(channel: grpc.Channel) -> open_inference_pb2_grpc.GRPCInferenceServiceStub:
    return open_inference_pb2_grpc.GRPCInferenceServiceStub(channel)


def refusal(call: Callable[[], Any]) -> tuple[grpc.StatusCode, str, dict[str, str]]:
    """Return code, details and trailing metadata of a call that must fail without revealing internals."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error: Any = caught.value
    assert not re.search(r"Traceback|\.py|Error\b|Unexpected|0x[0-9a-f]{6}", error.details()), error.details()
    return error.code(), error.details(), dict(error.trailing_metadata())


def metric(http: httpx.Client, name: str) -> float:
    """Return the sum of a metric over its labels."""
    values = re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", http.get("/metrics").text, re.MULTILINE)
    return sum(map(float, values))


# -- tdm.images.v1.ImageService --------------------------------------------------------------------


def test_a_picture_equals_that_of_http(images: images_pb2_grpc.ImageServiceStub, http: httpx.Client) -> None:
    request = pb.GenerateRequest(prompt=PROMPT, seed=7, num_inference_steps=2, strict=True)
    answer, call = images.Generate.with_call(request, metadata=(("x-request-id", "abc-123"),))
    body = {"prompt": PROMPT, "seed": 7, "num_inference_steps": 2, "strict": True}
    other = http.post("/v1/images/generations", json=body).json()
    (image,) = answer.images
    assert image.content == base64.b64decode(other["data"][0]["b64_json"])
    assert (image.seed, image.num_inference_steps) == (7, 2)
    assert (answer.size.width, answer.size.height, answer.output_format) == (64, 64, pb.OUTPUT_FORMAT_PNG)
    assert image.receipt.pixels_sha256 == other["data"][0]["receipt"]["pixels_sha256"]
    assert answer.usage.total_tokens == other["usage"]["total_tokens"]
    assert len(answer.timings.steps_ms) == 2 and answer.predicted_ms > 0
    assert not answer.HasField("latency_budget_kept")
    assert dict(call.trailing_metadata())["x-request-id"] == "abc-123"


def test_formats_and_bare_pixels(images: images_pb2_grpc.ImageServiceStub) -> None:
    def make(output_format: int) -> bytes:
        request = pb.GenerateRequest(prompt=PROMPT, seed=7, strict=True, output_format=output_format)
        answer = images.Generate(request)
        assert answer.output_format == output_format
        return answer.images[0].content

    for output_format, name in ((pb.OUTPUT_FORMAT_WEBP, "WEBP"), (pb.OUTPUT_FORMAT_JPEG, "JPEG")):
        assert Image.open(io.BytesIO(make(output_format))).format == name
    pixels = np.frombuffer(make(pb.OUTPUT_FORMAT_PIXELS), np.uint8).reshape(64, 64, 3)
    file = Image.open(io.BytesIO(make(pb.OUTPUT_FORMAT_PNG))).convert("RGB")
    np.testing.assert_array_equal(pixels, np.asarray(file))


def test_several_pictures_and_automatic_steps(images: images_pb2_grpc.ImageServiceStub) -> None:
    auto = pb.AutoSteps(min_inference_steps=3)
    answer = images.Generate(pb.GenerateRequest(prompt="x " * 200, n=3, seed=2**32 - 1, auto_steps=auto))
    assert [image.seed for image in answer.images] == [2**32 - 1, 0, 1]
    assert all(image.num_inference_steps in (3, 4) for image in answer.images)
    wrapped, truncated = answer.warnings
    assert "go on from seed 0" in wrapped and "tokens" in truncated


def test_a_stream_sends_a_draft_previews_and_the_picture(images: images_pb2_grpc.ImageServiceStub) -> None:
    picture = pb.GenerateRequest(prompt=PROMPT, seed=7, num_inference_steps=4)
    events = list(images.GenerateStream(pb.GenerateStreamRequest(picture=picture, partial_images=3, draft=True)))
    assert [event.WhichOneof("event") for event in events] == ["partial_image"] * 3 + ["completed"]
    partial = [event.partial_image for event in events[:-1]]
    assert [part.index for part in partial] == [0, 1, 2]
    assert [part.is_draft for part in partial] == [True, False, False]
    assert all(Image.open(io.BytesIO(part.content)).size == (64, 64) for part in partial)
    assert events[-1].completed.images[0].seed == 7
    (only,) = images.GenerateStream(pb.GenerateStreamRequest(picture=picture))
    assert only.WhichOneof("event") == "completed"


def test_the_models_equal_those_of_http(images: images_pb2_grpc.ImageServiceStub, http: httpx.Client) -> None:
    (model,) = images.ListModels(pb.ListModelsRequest()).models
    (card,) = http.get("/v1/models").json()["data"]
    assert (model.id, model.digest, list(model.step_counts)) == (card["id"], card["digest"], card["step_counts"])
    assert {str(steps): psnr for steps, psnr in model.parity_psnr_db.items()} == card["parity_psnr_db"]


@pytest.mark.parametrize(
    ("messages", "schema"),
    [
        ((pb.GenerateRequest, pb.GenerateStreamRequest), EditRequest),
        ((pb.GenerateVideoRequest, pb.GenerateVideoStreamRequest), VideoGenerationRequest),
    ],
)
def test_the_schema_has_every_field_of_http(messages: tuple[Any, ...], schema: type[BaseModel]) -> None:
    http_only = {"response_format", "stream", "background"}
    http_only |= {"user", "quality", "style", "moderation", "safety_identifier", "input_fidelity"}  # unused
    fields = {name for message in (*messages, pb.AutoSteps) for name in message.DESCRIPTOR.fields_by_name}
    assert fields - {"auto_steps", "picture", "video"} == set(schema.model_fields) - http_only


# -- deadlines and leaving -------------------------------------------------------------------------


def test_a_deadline_is_a_latency_budget(images: images_pb2_grpc.ImageServiceStub) -> None:
    request = pb.GenerateRequest(prompt=PROMPT, num_inference_steps=1)
    assert images.Generate(request, timeout=LONG_S).latency_budget_kept
    assert not images.Generate(request, timeout=LONG_S, metadata=NO_BUDGET).HasField("latency_budget_kept")
    code, details, trailers = refusal(
        lambda: images.Generate(pb.GenerateRequest(prompt=PROMPT, latency_budget_ms=0.01), timeout=LONG_S)
    )
    assert code is Code.INVALID_ARGUMENT and trailers["code"] == "latency_budget_too_small", details
    stream = images.GenerateStream(pb.GenerateStreamRequest(picture=request), timeout=LONG_S)
    assert next(stream).completed.latency_budget_kept


def test_an_impossible_deadline_is_refused_and_no_picture_is_made(
    images: images_pb2_grpc.ImageServiceStub, http: httpx.Client
) -> None:
    made = metric(http, "tdm_pictures_total")
    for timeout_s in (1e-3 * calls.DEADLINE_MARGIN_MS, 1e-3 * calls.DEADLINE_MARGIN_MS + 2e-3):
        with pytest.raises(grpc.RpcError) as caught:
            images.Generate(pb.GenerateRequest(prompt=PROMPT), timeout=timeout_s)
        assert caught.value.code() is Code.DEADLINE_EXCEEDED
    assert metric(http, "tdm_pictures_total") == made


@pytest.mark.parametrize("way", ["cancel", "deadline"])
def test_the_call_of_a_client_that_leaves_is_cancelled(
    images: images_pb2_grpc.ImageServiceStub, http: httpx.Client, way: str
) -> None:
    """The clients leave when some pictures are being made. Where all were made by then, they try again."""
    request = pb.GenerateRequest(prompt="a cat", n=10)
    cancelled, pictures = (lambda: metric(http, "tdm_cancelled_total")), (lambda: metric(http, "tdm_pictures_total"))
    started_s = time.monotonic()
    for call in [images.Generate.future(request, metadata=NO_BUDGET) for _ in range(3)]:
        call.result()
    timeout_s = (time.monotonic() - started_s) / 2 if way == "deadline" else None
    for _ in range(5):
        before, made = cancelled(), pictures()
        asked = [images.Generate.future(request, timeout=timeout_s, metadata=NO_BUDGET) for _ in range(3)]
        if way == "cancel":
            wait_until(lambda: metric(http, "tdm_live_samples") > 0 or pictures() - made == 30)  # noqa: B023
            for call in asked:
                call.cancel()
        wait_until(lambda: all(call.done() for call in asked))  # noqa: B023
        wait_until(
            lambda: metric(http, "tdm_live_samples") == 0 and (cancelled() > before or pictures() - made == 30)  # noqa: B023
        )
        if cancelled() > before:
            break
    left = {call.code() for call in asked} - {Code.OK}  # one may have had all its pictures by then
    assert left == {Code.CANCELLED if way == "cancel" else Code.DEADLINE_EXCEEDED}
    assert cancelled() > before and pictures() - made < 30


def test_a_client_that_leaves_a_stream_does_not_disturb_others(
    images: images_pb2_grpc.ImageServiceStub, http: httpx.Client
) -> None:
    picture = pb.GenerateRequest(prompt=PROMPT)
    for _ in range(3):
        stream = images.GenerateStream(pb.GenerateStreamRequest(picture=picture, partial_images=3))
        assert next(stream).WhichOneof("event") == "partial_image"
        stream.cancel()
    wait_until(lambda: metric(http, "tdm_live_samples") == 0)
    assert images.Generate(picture).images


def test_weighted_words_make_the_picture_of_http(images: images_pb2_grpc.ImageServiceStub, http: httpx.Client) -> None:
    """On the server's compiled text encoder. The receipt names the syntax."""
    fields = {"prompt": "a (red:1.6) [heart]", "seed": 7, "strict": True}
    made = images.Generate(pb.GenerateRequest(**fields, prompt_syntax="a1111")).images[0]
    answer = http.post("/v1/images/generations", json=fields | {"prompt_syntax": "a1111"}).json()["data"][0]
    assert made.receipt.prompt_syntax == answer["receipt"]["prompt_syntax"] == "a1111"
    assert made.receipt.pixels_sha256 == answer["receipt"]["pixels_sha256"]
    plain = images.Generate(pb.GenerateRequest(**fields)).images[0].receipt
    assert plain.prompt_syntax == "plain" and plain.pixels_sha256 != made.receipt.pixels_sha256


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt_syntax": "compel"}, "prompt_syntax"),
        ({"prompt_syntax": "a1111", "prompt": "a BREAK b"}, "prompt"),
        ({"prompt_syntax": "a1111", "prompt": "a (b:99)"}, "prompt"),
        ({"prompt_syntax": "a1111", "prompt": "a <lora:ink:1>"}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "a\0b"}, "prompt"),
        ({"prompt": "x" * 60_000}, "prompt"),
        ({"n": 0}, "n"),
        ({"n": 2**32 - 1}, "n"),
        ({"size": {"width": 1024, "height": 1024}}, "size"),
        ({"size": {}}, "size"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_inference_steps": 10**6}, "num_inference_steps"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"latency_budget_ms": float("inf")}, "latency_budget_ms"),
        ({"decoder": 99}, "decoder"),
        ({"output_format": 99}, "output_format"),
    ],
)
def test_values_out_of_range_are_named(
    images: images_pb2_grpc.ImageServiceStub, fields: dict[str, Any], param: str
) -> None:
    request = pb.GenerateRequest(**({"prompt": PROMPT} | fields))
    code, details, trailers = refusal(lambda: images.Generate(request))
    assert (code, trailers["code"], trailers["param"]) == (Code.INVALID_ARGUMENT, "invalid_value", param), details
    assert trailers["x-should-retry"] == "false" and trailers["x-request-id"]


def test_a_missing_prompt_and_an_unknown_model_are_refused(images: images_pb2_grpc.ImageServiceStub) -> None:
    code, _, trailers = refusal(lambda: images.Generate(pb.GenerateRequest()))
    assert (code, trailers["code"]) == (Code.INVALID_ARGUMENT, "missing_required_parameter")
    code, details, trailers = refusal(lambda: images.Generate(pb.GenerateRequest(prompt=PROMPT, model="../x\n\u00fc")))
    assert (code, trailers["code"], trailers["param"]) == (Code.NOT_FOUND, "model_not_found", "model"), details


def test_a_stream_is_refused_before_it_begins(images: images_pb2_grpc.ImageServiceStub) -> None:
    for picture, param in (
        (pb.GenerateRequest(prompt=PROMPT, n=2), "n"),
        (pb.GenerateRequest(prompt=PROMPT, output_format=pb.OUTPUT_FORMAT_PIXELS), "output_format"),
        (None, "prompt"),
    ):
        request = pb.GenerateStreamRequest(picture=picture)
        code, _, trailers = refusal(lambda request=request: list(images.GenerateStream(request)))
        assert (code, trailers["param"]) == (Code.INVALID_ARGUMENT, param)


@pytest.mark.parametrize(
    ("path", "raw", "code"),
    [
        ("/tdm.images.v1.ImageService/Generate", b"\xff\xff\xff", Code.INVALID_ARGUMENT),
        ("/tdm.images.v1.ImageService/Generate", b"\x0a\x02\xff\xfe", Code.INVALID_ARGUMENT),  # a prompt not UTF-8
        ("/tdm.images.v1.ImageService/Generate", b"\xa2\x06\x03abc", Code.INVALID_ARGUMENT),  # an unknown field
        ("/grpc.health.v1.Health/Check", b"\xff\xff\xff", Code.INVALID_ARGUMENT),
        ("/grpc.health.v1.Health/List", b"", Code.UNIMPLEMENTED),
        ("/grpc.health.v1.Health/Check", b"\x0a\x01x", Code.NOT_FOUND),
        ("/inference.GRPCInferenceService/RepositoryIndex", b"", Code.UNIMPLEMENTED),
        ("/nowhere", b"", Code.UNIMPLEMENTED),
        ("/tdm.images.v1.ImageService/Generate", b"\x0a" + b"x" * 17 * 2**20, Code.RESOURCE_EXHAUSTED),
    ],
)
def test_hostile_bytes_are_refused(channel: grpc.Channel, path: str, raw: bytes, code: grpc.StatusCode) -> None:
    assert refusal(lambda: channel.unary_unary(path)(raw))[0] is code


@pytest.mark.parametrize(
    "metadata",
    [
        (("x-request-id", "y" * 300),),
        (("x-request-id", ""),),
        (("x-request-id-bin", b"\xff\0"), ("authorization-bin", b"\xff")),
        (("authorization", "Bearer"), ("authorization", "Basic x")),
        (("x-tdm-deadline-budget", "perhaps"),),
    ],
)
def test_odd_metadata_does_not_disturb_a_call(images: images_pb2_grpc.ImageServiceStub, metadata: Any) -> None:
    _, call = images.ListModels.with_call(pb.ListModelsRequest(), metadata=metadata)
    assert len(dict(call.trailing_metadata())["x-request-id"]) == 36


def test_too_much_metadata_and_compression_are_refused(images: images_pb2_grpc.ImageServiceStub) -> None:
    big = (("x-big", "y" * 100_000),)
    assert refusal(lambda: images.ListModels(pb.ListModelsRequest(), metadata=big))[0] is Code.RESOURCE_EXHAUSTED
    squeezed = pb.GenerateRequest(prompt=" " * 60_000)
    code, _, _ = refusal(lambda: images.Generate(squeezed, compression=grpc.Compression.Gzip))
    assert code is Code.UNIMPLEMENTED


def test_quoted_text_of_a_client_is_made_printable() -> None:
    assert printable(" a\r\nb\u00fc " + "x" * 300) == "a??b? " + "x" * 249


# -- the Open Inference Protocol -------------------------------------------------------------------


def tensor(name: str, datatype: str, shape: tuple[int, ...] = (1,), **contents: Any) -> Any:
    made = open_inference_pb2.ModelInferRequest.InferInputTensor(name=name, datatype=datatype, shape=shape)
    if contents:
        made.contents.CopyFrom(open_inference_pb2.InferTensorContents(**contents))
    return made


def infer_request(*inputs: Any, model: str = "tdm-emoji", **fields: Any) -> Any:
    return open_inference_pb2.ModelInferRequest(model_name=model, inputs=inputs, **fields)


PROMPT_TENSOR = tensor("prompt", "BYTES", bytes_contents=[PROMPT.encode()])
BARE_PROMPT = tensor("prompt", "BYTES")


def raw_bytes(text: bytes) -> bytes:
    return struct.pack("<I", len(text)) + text


def parameter(value: Any) -> Any:
    kind = {bool: "bool_param", int: "int64_param", str: "string_param"}[type(value)]
    return open_inference_pb2.InferParameter(**{kind: value})


def test_typed_and_raw_tensors_make_the_typed_services_picture(
    images: images_pb2_grpc.ImageServiceStub, inference: open_inference_pb2_grpc.GRPCInferenceServiceStub
) -> None:
    parameters = {"strict": parameter(True), "latency_budget_ms": parameter(60_000)}
    typed = infer_request(
        PROMPT_TENSOR,
        tensor("negative_prompt", "BYTES", bytes_contents=[b""]),
        tensor("seed", "UINT64", uint64_contents=[7]),
        tensor("num_inference_steps", "INT32", int_contents=[2]),
        parameters=parameters,
        id="call-1",
    )
    raw = infer_request(
        BARE_PROMPT,
        tensor("seed", "INT64"),
        tensor("num_inference_steps", "INT64"),
        raw_input_contents=[raw_bytes(PROMPT.encode()), struct.pack("<q", 7), struct.pack("<q", 2)],
        parameters=parameters,
    )
    pixels = pb.OUTPUT_FORMAT_PIXELS
    request = pb.GenerateRequest(prompt=PROMPT, seed=7, num_inference_steps=2, strict=True, output_format=pixels)
    expected = images.Generate(request).images[0].content
    for asked, call_id in ((typed, "call-1"), (raw, "")):
        answer = inference.ModelInfer(asked)
        assert (answer.id, answer.model_name) == (call_id, "tdm-emoji")
        assert [(o.name, o.datatype, list(o.shape)) for o in answer.outputs] == [
            ("generated_image", "UINT8", [64, 64, 3]),
            ("seed", "INT64", [1]),
            ("num_inference_steps", "INT32", [1]),
        ]
        assert list(answer.raw_output_contents) == [expected, struct.pack("<q", 7), struct.pack("<i", 2)]
        assert answer.parameters["latency_budget_kept"].bool_param


def test_only_requested_outputs_are_sent(inference: open_inference_pb2_grpc.GRPCInferenceServiceStub) -> None:
    wanted = open_inference_pb2.ModelInferRequest.InferRequestedOutputTensor
    auto = {"num_inference_steps": parameter("auto"), "min_inference_steps": parameter(2)}
    auto["binary_data_output"] = parameter(True)  # KServe's client sends what HTTP says about binary data here too
    prompt = tensor("prompt", "BYTES", bytes_contents=[PROMPT.encode()])
    prompt.parameters["binary_data_size"].int64_param = len(PROMPT)
    seed = wanted(name="seed", parameters={"binary_data": parameter(True)})
    answer = inference.ModelInfer(infer_request(prompt, outputs=[seed], parameters=auto))
    assert [output.name for output in answer.outputs] == ["seed"] and len(answer.raw_output_contents) == 1
    code, details, _ = refusal(lambda: inference.ModelInfer(infer_request(PROMPT_TENSOR, outputs=[wanted(name="x")])))
    assert code is Code.INVALID_ARGUMENT and "generated_image" in details


def raw_request(*inputs: Any, raws: list[bytes]) -> Any:
    return infer_request(*inputs, raw_input_contents=raws)


NOTHING = open_inference_pb2.InferParameter()
INT64_SEED = tensor("seed", "INT64")
NEGATIVE_SEED = tensor("seed", "INT64", int64_contents=[-2])
HUGE_SEED = tensor("seed", "UINT64", uint64_contents=[2**64 - 1])


@pytest.mark.parametrize(
    ("request_", "param", "reason"),
    [
        (infer_request(), "prompt", "required"),
        (infer_request(PROMPT_TENSOR, model="x"), "model", "tdm-emoji"),
        (infer_request(PROMPT_TENSOR, model_version="2"), "model_version", "has 1"),
        (infer_request(tensor("promt", "BYTES")), "promt", "num_inference_steps"),
        (infer_request(tensor("prompt", "FP32")), "prompt", "send BYTES"),
        (infer_request(tensor("prompt", "BYTES", (1, 1))), "prompt", "[1]"),
        (infer_request(tensor("prompt", "BYTES", (-1,))), "prompt", "[1]"),
        (infer_request(tensor("prompt", "BYTES", ())), "prompt", "[1]"),
        (infer_request(BARE_PROMPT), "prompt", "none; send one in bytes_contents"),
        (infer_request(tensor("prompt", "BYTES", bytes_contents=[b"a", b"b"])), "prompt", "2 in bytes_contents"),
        (infer_request(tensor("prompt", "BYTES", bytes_contents=[b"\xff"])), "prompt", "UTF-8"),
        (infer_request(PROMPT_TENSOR, PROMPT_TENSOR), "prompt", "twice"),
        (infer_request(PROMPT_TENSOR, NEGATIVE_SEED), "seed", "4294967295"),
        (infer_request(PROMPT_TENSOR, HUGE_SEED), "seed", "4294967295"),
        (raw_request(BARE_PROMPT, raws=[b"\xff"]), "prompt", "uint32"),
        (raw_request(BARE_PROMPT, raws=[struct.pack("<I", 2**32 - 1) + b"a"]), "prompt", "uint32"),
        (raw_request(BARE_PROMPT, INT64_SEED, raws=[raw_bytes(b"a"), b"\0"]), "seed", "one INT64 has 8"),
        (raw_request(PROMPT_TENSOR, raws=[raw_bytes(b"a")]), "prompt", "send one of them"),
        (raw_request(PROMPT_TENSOR, raws=[b"", b""]), "raw_input_contents", "2 entries for 1 input"),
        (infer_request(PROMPT_TENSOR, parameters={"n": parameter(2)}), "n", "latency_budget_ms"),
        (infer_request(PROMPT_TENSOR, parameters={"strict": parameter("yes")}), "strict", "'yes'"),
    ],
)
def test_wrong_tensors_are_named(
    inference: open_inference_pb2_grpc.GRPCInferenceServiceStub, request_: Any, param: str, reason: str
) -> None:
    code, details, trailers = refusal(lambda: inference.ModelInfer(request_))
    assert code is (Code.NOT_FOUND if param.startswith("model") else Code.INVALID_ARGUMENT), details
    assert trailers["param"] == param and reason in details


def test_liveness_readiness_and_metadata_are_answered(
    inference: open_inference_pb2_grpc.GRPCInferenceServiceStub,
) -> None:
    assert inference.ServerLive(open_inference_pb2.ServerLiveRequest()).live
    assert inference.ServerReady(open_inference_pb2.ServerReadyRequest()).ready
    assert inference.ServerMetadata(open_inference_pb2.ServerMetadataRequest()).name == "tdm-serve"
    assert inference.ModelReady(open_inference_pb2.ModelReadyRequest(name="tdm-emoji", version="1")).ready
    metadata = inference.ModelMetadata(open_inference_pb2.ModelMetadataRequest(name="tdm-emoji"))
    first, *_ = metadata.inputs
    assert (first.name, first.datatype, list(first.shape)) == ("prompt", "BYTES", [1])
    first, *_ = metadata.outputs
    assert (first.name, first.datatype, list(first.shape)) == ("generated_image", "UINT8", [-1, -1, 3])
    for method, kind in (("ModelReady", "ModelReadyRequest"), ("ModelMetadata", "ModelMetadataRequest")):
        request = getattr(open_inference_pb2, kind)(name="other")
        call = getattr(inference, method)
        assert refusal(lambda call=call, request=request: call(request))[0] is Code.NOT_FOUND


# -- around it -------------------------------------------------------------------------------------


def test_the_benchmark_measures_grpc(server: RunningServer, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["latency", "--endpoint-type", "grpc", "--num-prompts", "4", "--num-warmups", "0"]
    address = f"127.0.0.1:{server.grpc_port}"
    assert tdm_bench([*command, "--base-url", address, "--num-inference-steps", "2,auto"]) == 0
    printed = capsys.readouterr().out
    assert "id tdm-emoji" in printed and "| step 2 |" in printed and "| grpc |" in printed
    assert re.search(r"^failed +0$", printed, re.MULTILINE)
    assert tdm_bench([*command, "--base-url", "grpc://127.0.0.1:9"]) == 2
    assert "--grpc-port" in capsys.readouterr().err


def test_a_taken_port_is_refused(server: RunningServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert tdm_serve(["--port", str(free_port()), "--grpc-port", str(server.grpc_port)]) == 2
    message = capsys.readouterr().err
    assert f"127.0.0.1:{server.grpc_port}" in message and "choose another with --grpc-port" in message


def test_http_and_grpc_cannot_share_a_port() -> None:
    for port in (0, 70000, 8000):
        with pytest.raises(ValueError, match=f"grpc_port is {port}"):
            ServerConfig(port=8000, grpc_port=port)


def test_the_generated_modules_match_the_proto_files(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools")
    version = importlib.metadata.version("grpcio-tools")
    if f"'{version}'" not in (PROTOS / "images_pb2_grpc.py").read_text():
        pytest.skip(f"they were generated by another grpcio-tools than {version}")
    folder = tmp_path / "serving/rpc/protos"
    shutil.copytree(PROTOS, folder, ignore=shutil.ignore_patterns("*_pb2*", "__pycache__"))
    protos = [str(file.relative_to(tmp_path)) for file in sorted(folder.glob("*.proto"))]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I."]
    outputs = ["--python_out=.", "--pyi_out=.", "--grpc_python_out=."]
    subprocess.run([*command, *outputs, *protos], cwd=tmp_path, check=True)
    generated = sorted(folder.glob("*_pb2*"))
    assert [file.name for file in generated] == sorted(file.name for file in PROTOS.glob("*_pb2*"))
    for file in generated:
        assert file.read_text() == (PROTOS / file.name).read_text(), f"run `make protos`: {file.name} is out of date"


# -- the edge, in this process ---------------------------------------------------------------------

KEY, POOR_KEY = draw_key(), draw_key()
KEYS = (APIKey("full", hash_key(KEY)), APIKey("poor", hash_key(POOR_KEY), requests_per_minute=1))
Talk = Callable[[grpc.aio.Channel], Awaitable[None]]


@pytest.fixture(scope="module")
def services(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    save_keys(file, list(KEYS))
    backend = BackendConfig("torch", threads=1)
    config = ServerConfig(
        models=(ModelSource(tiny_checkpoint), ModelSource(tiny_checkpoint, "second")),
        backend=backend,
        api_keys=file,
        body_timeout_s=0.3,
        max_open_requests=2,
        state_folder=tmp_path_factory.mktemp("state"),
    )
    metrics = ServerMetrics()
    started = Services.start(config, metrics, ImageService(config, metrics))
    yield started
    started.close()


def converse(services: Services, talk: Talk) -> None:
    """Serve one client until it is done."""

    async def run() -> None:
        port = free_port()
        front = await GRPCFront.start(services, "127.0.0.1", port)
        async with asyncio.timeout(30), grpc.aio.insecure_channel(f"127.0.0.1:{port}", OPTIONS) as channel:
            await talk(channel)
            await front.close()
        assert not front.is_running
        assert services.num_active == 0

    asyncio.run(run())


def bearer(key: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {key}"),)


async def refused(call: Awaitable[Any]) -> tuple[grpc.StatusCode, dict[str, str]]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), dict(caught.value.trailing_metadata())


def test_without_a_key_only_liveness_and_readiness_are_answered(services: Services) -> None:
    async def talk(channel: grpc.aio.Channel) -> None:
        images = images_pb2_grpc.ImageServiceStub(channel)
        inference = open_inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        reflection = channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
        closed = [
            images.Generate(pb.GenerateRequest(prompt=PROMPT)),
            images.Generate(pb.GenerateRequest(prompt=PROMPT), metadata=bearer(draw_key())),
            images.ListModels(pb.ListModelsRequest()),
            images.GenerateStream(pb.GenerateStreamRequest()).read(),
            reflection().read(),
            inference.ServerMetadata(open_inference_pb2.ServerMetadataRequest()),
            inference.ModelReady(open_inference_pb2.ModelReadyRequest(name="x")),
            inference.ModelInfer(open_inference_pb2.ModelInferRequest()),
        ]
        for call in closed:
            code, trailers = await refused(call)
            assert (code, trailers["code"]) == (Code.UNAUTHENTICATED, "invalid_api_key")
        health = health_pb2_grpc.HealthStub(channel)
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.SERVING
        assert (await inference.ServerReady(open_inference_pb2.ServerReadyRequest())).ready
        assert (await images.Generate(pb.GenerateRequest(prompt=PROMPT), metadata=bearer(KEY))).images

    converse(services, talk)


def test_model_infer_makes_the_picture_of_the_model_that_it_names(services: Services) -> None:
    async def talk(channel: grpc.aio.Channel) -> None:
        inference = open_inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        for name in ("tdm-emoji", "second"):
            answer = await inference.ModelInfer(infer_request(PROMPT_TENSOR, model=name), metadata=bearer(KEY))
            assert answer.model_name == name

    converse(services, talk)


def test_a_used_up_quota_gives_a_retry_time(services: Services) -> None:
    async def talk(channel: grpc.aio.Channel) -> None:
        images = images_pb2_grpc.ImageServiceStub(channel)
        await images.Generate(pb.GenerateRequest(prompt=PROMPT), metadata=bearer(POOR_KEY))
        code, trailers = await refused(images.Generate(pb.GenerateRequest(prompt=PROMPT), metadata=bearer(POOR_KEY)))
        assert (code, trailers["code"]) == (Code.RESOURCE_EXHAUSTED, "rate_limit_exceeded")
        assert int(trailers["retry-after-ms"]) > 1000

    converse(services, talk)


def test_open_call_limit_and_timeout_of_a_silent_client(services: Services) -> None:
    async def talk(channel: grpc.aio.Channel) -> None:
        images = images_pb2_grpc.ImageServiceStub(channel)
        silent = [channel.stream_stream("/tdm.images.v1.ImageService/Generate")(metadata=bearer(KEY)) for _ in range(2)]
        while services.num_active < 2:
            await asyncio.sleep(0.01)
        code, trailers = await refused(images.ListModels(pb.ListModelsRequest(), metadata=bearer(KEY)))
        assert (code, trailers["code"]) == (Code.RESOURCE_EXHAUSTED, "too_many_requests")
        assert trailers["retry-after-ms"] == "1000"
        for call in silent:
            code, trailers = await refused(call.read())
            assert (code, trailers["code"]) == (Code.DEADLINE_EXCEEDED, "body_timeout")
        await images.ListModels(pb.ListModelsRequest(), metadata=bearer(KEY))

    converse(services, talk)


def test_an_internal_error_reveals_nothing(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a secret of the inside")

    monkeypatch.setattr(services.images, "_submit", fail)

    async def talk(channel: grpc.aio.Channel) -> None:
        images = images_pb2_grpc.ImageServiceStub(channel)
        for call in (
            images.Generate(pb.GenerateRequest(prompt=PROMPT), metadata=bearer(KEY)),
            images.GenerateStream(
                pb.GenerateStreamRequest(picture=pb.GenerateRequest(prompt=PROMPT)), metadata=bearer(KEY)
            ).read(),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert caught.value.code() is Code.INTERNAL
            assert caught.value.details() == "internal error; the request was not at fault"
            assert "secret" not in repr(caught.value.trailing_metadata())

    converse(services, talk)


def test_health_watchers_are_notified_when_the_server_stops(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edge, "MAX_WATCHERS", 2)

    async def talk(channel: grpc.aio.Channel) -> None:
        health = health_pb2_grpc.HealthStub(channel)
        watching = [health.Watch(health_pb2.HealthCheckRequest(service=s)) for s in ("", "tdm.images.v1.ImageService")]
        for call in watching:
            assert (await call.read()).status == health_pb2.HealthCheckResponse.SERVING
        code, trailers = await refused(health.Watch(health_pb2.HealthCheckRequest()).read())
        assert (code, trailers["code"]) == (Code.RESOURCE_EXHAUSTED, "too_many_requests")
        monkeypatch.setattr(services, "is_draining", True)
        for call in watching:
            assert (await call.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        code, trailers = await refused(
            images_pb2_grpc.ImageServiceStub(channel).ListModels(pb.ListModelsRequest(), metadata=bearer(KEY))
        )
        assert (code, trailers["code"], trailers["retry-after-ms"]) == (Code.UNAVAILABLE, "not_ready", "1000")
        inference = open_inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        assert (await inference.ServerLive(open_inference_pb2.ServerLiveRequest())).live
        assert not (await inference.ServerReady(open_inference_pb2.ServerReadyRequest())).ready

    converse(services, talk)


def test_a_front_on_a_taken_address_names_it(services: Services) -> None:
    async def run() -> None:
        with pytest.raises(OSError, match="--grpc-port"):
            await GRPCFront.start(services, "203.0.113.1", free_port())

    asyncio.run(run())
