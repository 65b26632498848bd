"""inference.GRPCInferenceService: the Open Inference Protocol, version 2, for pictures.

A call makes one picture. Inputs are tensors of shape [1], as `contents` or as `raw_input_contents`. Other fields of
HTTP are the request's parameters.
"""

from __future__ import annotations

import importlib.metadata
import struct
from collections.abc import Mapping
from typing import Any

import grpc

from serving.errors import APIError, invalid
from serving.fronts.services import Services
from serving.rpc.calls import budgeted, current_call
from serving.rpc.protos import open_inference_pb2 as pb
from serving.schema.answers import ImageAnswer
from serving.schema.image_request import order_from_fields
from tdm_runtime.errors import shown

VERSION = "1"
"""Version of every model; another checkpoint is another model."""
INPUTS = {
    "prompt": ("BYTES",),
    "negative_prompt": ("BYTES",),
    "seed": ("INT64", "UINT64"),
    "num_inference_steps": ("INT32", "INT64"),
}
"""Input -> its datatypes; ModelMetadata names the first."""
OUTPUTS = {"generated_image": "UINT8", "seed": "INT64", "num_inference_steps": "INT32"}
CONTENTS = {"BYTES": "bytes_contents", "INT32": "int_contents", "INT64": "int64_contents", "UINT64": "uint64_contents"}
"""Datatype -> the field of `InferTensorContents` with its values."""
LAYOUTS = {"INT32": "<i", "INT64": "<q", "UINT64": "<Q"}
PARAMETERS = ("size", "num_inference_steps", "min_inference_steps", "latency_budget_ms", "strict", "decoder")
LENGTH = struct.Struct("<I")


class InferenceServicer:
    """Answers the calls of one replica."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def ServerLive(
        self, request: pb.ServerLiveRequest, context: grpc.aio.ServicerContext
    ) -> pb.ServerLiveResponse:
        """Answer while the process runs."""
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(
        self, request: pb.ServerReadyRequest, context: grpc.aio.ServicerContext
    ) -> pb.ServerReadyResponse:
        """Return whether pictures can be made."""
        return pb.ServerReadyResponse(ready=self._services.is_ready)

    async def ServerMetadata(
        self, request: pb.ServerMetadataRequest, context: grpc.aio.ServicerContext
    ) -> pb.ServerMetadataResponse:
        """Return the server's name and version."""
        return pb.ServerMetadataResponse(name="tdm-serve", version=_server_version())

    async def ModelReady(
        self, request: pb.ModelReadyRequest, context: grpc.aio.ServicerContext
    ) -> pb.ModelReadyResponse:
        """Return whether a model can make pictures; an unknown model is an error."""
        self._check_model(request.name, request.version)
        return pb.ModelReadyResponse(ready=self._services.is_ready)

    async def ModelMetadata(
        self, request: pb.ModelMetadataRequest, context: grpc.aio.ServicerContext
    ) -> pb.ModelMetadataResponse:
        """Return a model's inputs and outputs."""
        self._check_model(request.name, request.version)
        tensor = pb.ModelMetadataResponse.TensorMetadata
        return pb.ModelMetadataResponse(
            name=request.name,
            versions=[VERSION],
            platform="tdm_diffusers",
            inputs=[tensor(name=name, datatype=types[0], shape=[1]) for name, types in INPUTS.items()],
            outputs=[
                tensor(name=name, datatype=datatype, shape=[-1, -1, 3] if name == "generated_image" else [1])
                for name, datatype in OUTPUTS.items()
            ],
        )

    async def ModelInfer(
        self, request: pb.ModelInferRequest, context: grpc.aio.ServicerContext
    ) -> pb.ModelInferResponse:
        """Make a picture."""
        self._check_model(request.model_name, request.model_version)
        names = wanted_outputs(request)
        fields = fields_of(request) | {"model": request.model_name}
        with budgeted(order_from_fields(fields, self._services.images.recipe).as_pixels()) as order:
            current_call().caller.spend(order.cost)
            answer = await self._services.images.generate(order)
        return to_response(answer, names, request.id)

    def _check_model(self, name: str, version: str) -> None:
        """Check that a model exists in this version.

        Raises:
            APIError: 404, it does not.
        """
        card = self._services.images.model_card(name)
        if version not in ("", VERSION):
            message = f"version is {shown(version)}; {card.id} has {VERSION}"
            raise invalid(message, "model_version", "model_not_found", 404)


# -- requests --------------------------------------------------------------------------------------


def fields_of(request: pb.ModelInferRequest) -> dict[str, Any]:
    """Return the inputs and parameters of a message under HTTP's names.

    Raises:
        APIError: 400 naming the tensor or parameter, its value and the allowed values.
    """
    raws: list[bytes | None] = [*request.raw_input_contents] or [None] * len(request.inputs)
    if len(raws) != len(request.inputs):
        message = f"raw_input_contents has {len(raws)} entries for {len(request.inputs)} inputs; send one for each"
        raise _refused(message, "raw_input_contents")
    fields: dict[str, Any] = {}
    for tensor, raw in zip(request.inputs, raws, strict=True):
        _check_tensor(tensor)
        _add(fields, tensor.name, _value_of(tensor, raw))
    for name, parameter in request.parameters.items():
        if name not in PARAMETERS:
            known = ", ".join(PARAMETERS)
            raise invalid(f"{shown(name)} is no parameter; known are {known}", name[:64], "unknown_parameter")
        choice = parameter.WhichOneof("parameter_choice")
        _add(fields, name, None if choice is None else getattr(parameter, choice))
    return fields


def wanted_outputs(request: pb.ModelInferRequest) -> list[str]:
    """Return the names of the requested outputs.

    Raises:
        APIError: 400, an output is unknown or has parameters.
    """
    for output in request.outputs:
        if output.name not in OUTPUTS:
            known = ", ".join(OUTPUTS)
            raise invalid(f"{shown(output.name)} is no output; known are {known}", "outputs", "unknown_parameter")
        _refuse_parameters(output)
    return list(dict.fromkeys(output.name for output in request.outputs)) or list(OUTPUTS)


def _check_tensor(tensor: pb.ModelInferRequest.InferInputTensor) -> None:
    types = INPUTS.get(tensor.name)
    if types is None:
        known = ", ".join(INPUTS)
        raise invalid(f"{shown(tensor.name)} is no input; known are {known}", tensor.name[:64], "unknown_parameter")
    if tensor.datatype not in types:
        message = f"the datatype of {tensor.name} is {shown(tensor.datatype)}; send {' or '.join(types)}"
        raise _refused(message, tensor.name)
    if list(tensor.shape) != [1]:
        message = f"the shape of {tensor.name} is {shown(list(tensor.shape))}; it is [1], one picture a call"
        raise _refused(message, tensor.name)
    _refuse_parameters(tensor)


def _refuse_parameters(
    tensor: pb.ModelInferRequest.InferInputTensor | pb.ModelInferRequest.InferRequestedOutputTensor,
) -> None:
    if tensor.parameters:
        message = f"parameters of {tensor.name} are not read (shared memory, classification); leave them out"
        raise _refused(message, tensor.name)


def _value_of(tensor: pb.ModelInferRequest.InferInputTensor, raw: bytes | None) -> Any:
    """Return the one element of a tensor that has passed `_check_tensor`."""
    if raw is not None and tensor.HasField("contents"):
        raise _refused(f"{tensor.name} has contents beside raw_input_contents; send one of them", tensor.name)
    value = _typed_value(tensor) if raw is None else _raw_value(tensor, raw)
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _refused(f"{tensor.name} is not UTF-8 (byte {error.start}); encode it as UTF-8", tensor.name) from None


def _typed_value(tensor: pb.ModelInferRequest.InferInputTensor) -> Any:
    filled = {field.name: len(values) for field, values in tensor.contents.ListFields()}
    field = CONTENTS[tensor.datatype]
    if filled != {field: 1}:
        found = ", ".join(f"{count} in {name}" for name, count in filled.items()) or "none"
        raise _refused(f"the elements of {tensor.name} are {found}; send one in {field}", tensor.name)
    return getattr(tensor.contents, field)[0]


def _raw_value(tensor: pb.ModelInferRequest.InferInputTensor, raw: bytes) -> Any:
    if tensor.datatype == "BYTES":
        if len(raw) < LENGTH.size or LENGTH.unpack_from(raw)[0] != len(raw) - LENGTH.size:
            message = f"raw contents of {tensor.name} ({len(raw)} bytes) are not one element with its length before it"
            raise _refused(f"{message}; send its length as little-endian uint32, then the element", tensor.name)
        return raw[LENGTH.size :]
    layout = LAYOUTS[tensor.datatype]
    if len(raw) != struct.calcsize(layout):
        message = f"raw contents of {tensor.name} have {len(raw)} bytes"
        raise _refused(f"{message}; one {tensor.datatype} has {struct.calcsize(layout)}", tensor.name)
    return struct.unpack(layout, raw)[0]


def _add(fields: dict[str, Any], name: str, value: Any) -> None:
    if name in fields:
        raise _refused(f"{name} is sent twice; send it once", name)
    fields[name] = value


def _refused(message: str, param: str) -> APIError:
    return invalid(message, param, "invalid_value")


# -- answers ---------------------------------------------------------------------------------------


def to_response(answer: ImageAnswer, names: list[str], call_id: str) -> pb.ModelInferResponse:
    """Return a picture as tensors, with the other fields of HTTP as parameters."""
    (image,) = answer.images
    tensors = {
        "generated_image": ([answer.height, answer.width, 3], image.content),
        "seed": ([1], struct.pack("<q", image.seed)),
        "num_inference_steps": ([1], struct.pack("<i", image.num_inference_steps)),
    }
    tensor = pb.ModelInferResponse.InferOutputTensor
    return pb.ModelInferResponse(
        model_name=answer.model,
        model_version=VERSION,
        id=call_id,
        parameters=_parameters(answer),
        outputs=[tensor(name=name, datatype=OUTPUTS[name], shape=tensors[name][0]) for name in names],
        raw_output_contents=[tensors[name][1] for name in names],
    )


def _parameters(answer: ImageAnswer) -> Mapping[str, pb.InferParameter]:
    found = {
        "total_ms": pb.InferParameter(double_param=answer.timings.total_ms),
        "predicted_ms": pb.InferParameter(double_param=answer.predicted_ms),
    }
    if answer.latency_budget_kept is not None:
        found["latency_budget_kept"] = pb.InferParameter(bool_param=answer.latency_budget_kept)
    if answer.warnings:
        found["warnings"] = pb.InferParameter(string_param="; ".join(answer.warnings))
    return found


def _server_version() -> str:
    try:
        return importlib.metadata.version("tdm-serve")
    except importlib.metadata.PackageNotFoundError:  # the package is not installed
        return "unknown"
