"""inference.GRPCInferenceService: the Open Inference Protocol, version 2, over gRPC.

Inputs are `contents` or `raw_input_contents`. `serving/schema/inference.py` has what HTTP shares.
"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc

from serving.fronts.edge import reading_pictures
from serving.fronts.services import Services
from serving.rpc.calls import made
from serving.rpc.protos import open_inference_pb2 as pb
from serving.schema.answers import ImageAnswer
from serving.schema.edit_request import is_edit
from serving.schema.inference import (
    PLATFORM,
    SERVER,
    VERSION,
    InputTensor,
    answer_parameters,
    check_version,
    fields_of,
    order_of,
    output_tensors,
    refused,
    tensors_of,
    wanted_outputs,
)
from tdm_runtime.version import package_version

CONTENTS = {"BYTES": "bytes_contents", "INT32": "int_contents", "INT64": "int64_contents", "UINT64": "uint64_contents"}
"""Datatype -> the field of `InferTensorContents` with its values."""


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
        return pb.ServerMetadataResponse(name=SERVER, version=package_version())

    async def ModelReady(
        self, request: pb.ModelReadyRequest, context: grpc.aio.ServicerContext
    ) -> pb.ModelReadyResponse:
        """Return whether a model can make pictures; an unknown model is an error."""
        check_version(self._services.images.model_card(request.name), request.version)
        return pb.ModelReadyResponse(ready=self._services.is_ready)

    async def ModelMetadata(
        self, request: pb.ModelMetadataRequest, context: grpc.aio.ServicerContext
    ) -> pb.ModelMetadataResponse:
        """Return a model's inputs and outputs."""
        card = self._services.images.model_card(request.name)
        check_version(card, request.version)
        inputs, outputs = tensors_of(card).described()
        tensor = pb.ModelMetadataResponse.TensorMetadata
        return pb.ModelMetadataResponse(
            name=request.name,
            versions=[VERSION],
            platform=PLATFORM,
            inputs=[tensor(**vars(about)) for about in inputs],
            outputs=[tensor(**vars(about)) for about in outputs],
        )

    async def ModelInfer(
        self, request: pb.ModelInferRequest, context: grpc.aio.ServicerContext
    ) -> pb.ModelInferResponse:
        """Make a picture or clip."""
        card = self._services.images.model_card(request.model_name)
        check_version(card, request.model_version)
        kind = tensors_of(card)
        fields = fields_of(kind, input_tensors(request), parameters_of(request)) | {"model": request.model_name}
        names = wanted_outputs(kind, ((output.name, output.parameters) for output in request.outputs), fields)
        recipe_of = self._services.images.recipe
        if is_edit(fields):
            with reading_pictures(self._services):
                order = await asyncio.to_thread(order_of, kind, fields, recipe_of)
        else:
            order = order_of(kind, fields, recipe_of)
        answer = await made(self._services.images, order)
        return to_response(answer, names, request.id)


def input_tensors(request: pb.ModelInferRequest) -> list[InputTensor]:
    """Return the inputs of a message.

    Raises:
        APIError: 400, an input has no element, or elements in two places.
    """
    raws: list[bytes | None] = [*request.raw_input_contents] or [None] * len(request.inputs)
    if len(raws) != len(request.inputs):
        message = f"raw_input_contents has {len(raws)} entries for {len(request.inputs)} inputs; send one for each"
        raise refused(message, "raw_input_contents")
    return [_input_tensor(tensor, raw) for tensor, raw in zip(request.inputs, raws, strict=True)]


def parameters_of(request: pb.ModelInferRequest) -> dict[str, Any]:
    """Return the parameters of a message; None for one without a value."""
    kinds = {name: parameter.WhichOneof("parameter_choice") for name, parameter in request.parameters.items()}
    return {name: kind and getattr(request.parameters[name], kind) for name, kind in kinds.items()}


def _input_tensor(tensor: pb.ModelInferRequest.InferInputTensor, raw: bytes | None) -> InputTensor:
    if raw is not None and tensor.HasField("contents"):
        raise refused(f"{tensor.name} has contents beside raw_input_contents; send one of them", tensor.name)
    filled = {field.name: values for field, values in tensor.contents.ListFields()}
    place = CONTENTS.get(tensor.datatype, "")
    if place and (others := sorted(filled.keys() - {place})):
        raise refused(f"{tensor.name} has elements in {', '.join(others)}; send one in {place}", tensor.name)
    values = [*filled.get(place, ())] if raw is None else raw
    return InputTensor(tensor.name, tensor.datatype, tensor.shape, values, place, tensor.parameters)


def to_response(answer: ImageAnswer, names: list[str], call_id: str) -> pb.ModelInferResponse:
    """Return a picture or clip as tensors, with the other fields of HTTP as parameters."""
    tensors = output_tensors(answer, names)
    tensor = pb.ModelInferResponse.InferOutputTensor
    return pb.ModelInferResponse(
        model_name=answer.model,
        model_version=VERSION,
        id=call_id,
        parameters={name: _parameter(value) for name, value in answer_parameters(answer).items()},
        outputs=[tensor(name=made.name, datatype=made.datatype, shape=made.shape) for made in tensors],
        raw_output_contents=[made.content for made in tensors],
    )


def _parameter(value: float | bool | str) -> pb.InferParameter:
    if isinstance(value, bool):
        return pb.InferParameter(bool_param=value)
    return pb.InferParameter(string_param=value) if isinstance(value, str) else pb.InferParameter(double_param=value)
