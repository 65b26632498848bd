"""What the messages of pictures and of clips have in common: fields under HTTP's names, and parts of answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from serving.errors import invalid
from serving.rpc.protos import images_pb2 as pb
from serving.schema.answers import ImageAnswer, MadeImage, PartialAnswer
from tdm_runtime.media.made_file import FileFormat

FORMATS: dict[FileFormat, pb.OutputFormat] = {
    "png": pb.OUTPUT_FORMAT_PNG,
    "webp": pb.OUTPUT_FORMAT_WEBP,
    "jpeg": pb.OUTPUT_FORMAT_JPEG,
    "mp4": pb.OUTPUT_FORMAT_MP4,
    "webm": pb.OUTPUT_FORMAT_WEBM,
    "gif": pb.OUTPUT_FORMAT_GIF,
}
DECODERS = {"full": pb.DECODER_FULL, "tiny": pb.DECODER_TINY}
AS_THEY_ARE = (
    "prompt",
    "prompt_syntax",
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
    "num_frames",
    "seconds",
    "fps",
    "mask",
    "strength",
)
"""Fields that HTTP and gRPC share, of pictures or clips. A message has either `num_inference_steps` or `auto_steps`."""


# -- requests --------------------------------------------------------------------------------------


def fields_of(request: pb.GenerateRequest | pb.GenerateVideoRequest) -> dict[str, Any]:
    """Return the fields of a message under HTTP's names.

    Raises:
        APIError: 400, the message has a field or value that this server does not know.
    """
    refuse_unknown(request)
    known = request.DESCRIPTOR.fields_by_name
    fields = {name: getattr(request, name) for name in AS_THEY_ARE if name in known and request.HasField(name)}
    if isinstance(request, pb.GenerateRequest) and request.image:
        fields["image"] = list(request.image)
    if request.HasField("size"):
        refuse_unknown(request.size)
        fields["size"] = f"{request.size.width}x{request.size.height}"
    if request.HasField("auto_steps"):
        refuse_unknown(request.auto_steps)
        fields["num_inference_steps"] = "auto"
        if request.auto_steps.HasField("min_inference_steps"):
            fields["min_inference_steps"] = request.auto_steps.min_inference_steps
    if request.decoder:
        fields["decoder"] = _named(request.decoder, DECODERS, "decoder")
    if request.output_format not in (pb.OUTPUT_FORMAT_UNSPECIFIED, pb.OUTPUT_FORMAT_PIXELS):
        fields["output_format"] = _named(request.output_format, FORMATS, "output_format")
    return fields


def stream_fields_of(
    request: pb.GenerateStreamRequest | pb.GenerateVideoStreamRequest,
    ordered: pb.GenerateRequest | pb.GenerateVideoRequest,
) -> dict[str, Any]:
    """Return the fields of a stream's message, and of the request in it, under HTTP's names.

    Raises:
        APIError: 400, the message has a field or value that this server does not know, or asks for bare pixels.
    """
    refuse_unknown(request)
    if wants_pixels(ordered):
        raise invalid("output_format is PIXELS; streams carry files, call Generate", "output_format", "invalid_value")
    known = request.DESCRIPTOR.fields_by_name
    names = [name for name in ("partial_images", "draft") if name in known and request.HasField(name)]
    return fields_of(ordered) | {"stream": True} | {name: getattr(request, name) for name in names}


def wants_pixels(request: pb.GenerateRequest | pb.GenerateVideoRequest) -> bool:
    """Return whether bare pixels are asked for in place of a file."""
    return request.output_format == pb.OUTPUT_FORMAT_PIXELS


def _named(value: int, names: Mapping[Any, int], param: str) -> str:
    """Return HTTP's name of an enum value."""
    for name, number in names.items():
        if number == value:
            return str(name)
    raise invalid(f"{param} is {value}; send one of {', '.join(names)}", param, "invalid_value")


def refuse_unknown(message: Message) -> None:
    """Refuse fields of a later .proto, which would change the picture, as HTTP refuses unknown names."""
    unknown = UnknownFieldSet(message)
    if len(unknown):
        number, name = unknown[0].field_number, message.DESCRIPTOR.full_name
        text = f"field {number} of {name} is not known to this server; leave it out, or use its .proto"
        raise invalid(text, None, "unknown_parameter")


# -- answers ---------------------------------------------------------------------------------------


def to_image(image: MadeImage) -> pb.Image:
    """Return a picture or clip with its receipt."""
    return pb.Image(
        content=image.content,
        seed=image.seed,
        num_inference_steps=image.num_inference_steps,
        is_cached=image.is_cached,
        num_steps_taken=image.num_steps_taken,
        receipt=pb.Receipt(**filled(pb.Receipt, asdict(image.receipt))),
    )


def how_made(answer: ImageAnswer, as_pixels: bool) -> dict[str, Any]:
    """Return the fields of an answer beside its files."""
    return {
        "created": answer.created,
        "model": answer.model,
        "output_format": pb.OUTPUT_FORMAT_PIXELS if as_pixels else FORMATS[answer.output_format],
        "size": pb.Size(width=answer.width, height=answer.height),
        "usage": pb.Usage(**filled(pb.Usage, asdict(answer.usage))),
        "timings": pb.Timings(**filled(pb.Timings, asdict(answer.timings))),
        "predicted_ms": answer.predicted_ms,
        "latency_budget_kept": answer.latency_budget_kept,
        "warnings": answer.warnings,
    }


def to_partial(part: PartialAnswer) -> pb.PartialImage:
    """Return a draft or preview."""
    return pb.PartialImage(
        content=part.content,
        index=part.index,
        created=part.created,
        output_format=FORMATS[part.output_format],
        size=pb.Size(width=part.width, height=part.height),
        is_draft=part.is_draft,
        num_steps_taken=part.num_steps_taken,
    )


def filled(kind: type[Message], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values for which a message has fields."""
    return {name: values[name] for name in kind.DESCRIPTOR.fields_by_name}
