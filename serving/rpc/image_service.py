"""tdm.images.v1.ImageService: typed messages with the fields of HTTP."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import asdict
from typing import Any

import grpc
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from serving.errors import invalid
from serving.fronts.services import Services
from serving.rpc.calls import budgeted, current_call
from serving.rpc.protos import images_pb2 as pb
from serving.schema.answers import ImageAnswer, PartialAnswer
from serving.schema.image_request import order_from_fields
from serving.schema.order import FileFormat

FORMATS: dict[FileFormat, pb.OutputFormat] = {
    "png": pb.OUTPUT_FORMAT_PNG,
    "webp": pb.OUTPUT_FORMAT_WEBP,
    "jpeg": pb.OUTPUT_FORMAT_JPEG,
}
DECODERS = {"full": pb.DECODER_FULL, "tiny": pb.DECODER_TINY}
AS_THEY_ARE = (
    "prompt",
    "model",
    "n",
    "seed",
    "num_inference_steps",
    "latency_budget_ms",
    "strict",
    "guidance_scale",
    "lora_scale",
    "negative_prompt",
    "output_compression",
    "metadata",
)
"""Fields that HTTP and gRPC share. A message has either `num_inference_steps` or `auto_steps`."""


class ImageServicer:
    """Answers the calls of one replica."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def Generate(self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext) -> pb.GenerateResponse:
        """Make pictures."""
        order = order_from_fields(fields_of(request), self._services.images.recipe)
        if as_pixels := request.output_format == pb.OUTPUT_FORMAT_PIXELS:
            order = order.as_pixels()
        with budgeted(order) as order:
            current_call().caller.spend(order.cost)
            answer = await self._services.images.generate(order)
        return to_response(answer, as_pixels)

    async def GenerateStream(
        self, request: pb.GenerateStreamRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.GenerateStreamResponse]:
        """Make one picture and send previews of it."""
        with budgeted(order_from_fields(stream_fields_of(request), self._services.images.recipe)) as order:
            current_call().caller.spend(order.cost)
            parts = await self._services.images.stream(order)
        async for part in parts:
            yield to_event(part)

    async def ListModels(
        self, request: pb.ListModelsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListModelsResponse:
        """List the served models."""
        models = (pb.Model(**_filled(pb.Model, asdict(card))) for card in self._services.images.models())
        return pb.ListModelsResponse(models=models)


# -- requests --------------------------------------------------------------------------------------


def fields_of(request: pb.GenerateRequest) -> dict[str, Any]:
    """Return the fields of a message under HTTP's names.

    Raises:
        APIError: 400, the message has a field or value that this server does not know.
    """
    _refuse_unknown(request)
    fields = {name: getattr(request, name) for name in AS_THEY_ARE if request.HasField(name)}
    if request.HasField("size"):
        _refuse_unknown(request.size)
        fields["size"] = f"{request.size.width}x{request.size.height}"
    if request.HasField("auto_steps"):
        _refuse_unknown(request.auto_steps)
        fields["num_inference_steps"] = "auto"
        if request.auto_steps.HasField("min_inference_steps"):
            fields["min_inference_steps"] = request.auto_steps.min_inference_steps
    if request.decoder:
        fields["decoder"] = _named(request.decoder, DECODERS, "decoder")
    if request.output_format not in (pb.OUTPUT_FORMAT_UNSPECIFIED, pb.OUTPUT_FORMAT_PIXELS):
        fields["output_format"] = _named(request.output_format, FORMATS, "output_format")
    return fields


def stream_fields_of(request: pb.GenerateStreamRequest) -> dict[str, Any]:
    """Return the fields of a stream's message under HTTP's names.

    Raises:
        APIError: 400, the message has a field or value that this server does not know, or asks for bare pixels.
    """
    _refuse_unknown(request)
    if request.picture.output_format == pb.OUTPUT_FORMAT_PIXELS:
        raise invalid("output_format is PIXELS; streams carry files, call Generate", "output_format", "invalid_value")
    fields = fields_of(request.picture) | {"stream": True}
    return fields | {name: getattr(request, name) for name in ("partial_images", "draft") if request.HasField(name)}


def _named(value: int, names: Mapping[Any, int], param: str) -> str:
    """Return HTTP's name of an enum value."""
    for name, number in names.items():
        if number == value:
            return str(name)
    raise invalid(f"{param} is {value}; send one of {', '.join(names)}", param, "invalid_value")


def _refuse_unknown(message: Message) -> None:
    """Refuse fields of a later .proto, which would change the picture, as HTTP refuses unknown names."""
    unknown = UnknownFieldSet(message)
    if len(unknown):
        number, name = unknown[0].field_number, message.DESCRIPTOR.full_name
        text = f"field {number} of {name} is not known to this server; leave it out, or use its .proto"
        raise invalid(text, None, "unknown_parameter")


# -- answers ---------------------------------------------------------------------------------------


def to_response(answer: ImageAnswer, as_pixels: bool = False) -> pb.GenerateResponse:
    """Return an answer as a message."""
    images = (
        pb.Image(
            content=image.content,
            seed=image.seed,
            num_inference_steps=image.num_inference_steps,
            is_cached=image.is_cached,
            receipt=pb.Receipt(**_filled(pb.Receipt, asdict(image.receipt))),
        )
        for image in answer.images
    )
    return pb.GenerateResponse(
        created=answer.created,
        model=answer.model,
        images=images,
        output_format=pb.OUTPUT_FORMAT_PIXELS if as_pixels else FORMATS[answer.output_format],
        size=pb.Size(width=answer.width, height=answer.height),
        usage=pb.Usage(**_filled(pb.Usage, asdict(answer.usage))),
        timings=pb.Timings(**_filled(pb.Timings, asdict(answer.timings))),
        predicted_ms=answer.predicted_ms,
        latency_budget_kept=answer.latency_budget_kept,
        warnings=answer.warnings,
    )


def to_event(part: PartialAnswer | ImageAnswer) -> pb.GenerateStreamResponse:
    """Return a part of a stream as a message."""
    if isinstance(part, ImageAnswer):
        return pb.GenerateStreamResponse(completed=to_response(part))
    partial = pb.PartialImage(
        content=part.content,
        index=part.index,
        created=part.created,
        output_format=FORMATS[part.output_format],
        size=pb.Size(width=part.width, height=part.height),
        is_draft=part.is_draft,
        num_steps_taken=part.num_steps_taken,
    )
    return pb.GenerateStreamResponse(partial_image=partial)


def _filled(kind: type[Message], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values for which a message has fields."""
    return {name: values[name] for name in kind.DESCRIPTOR.fields_by_name}
