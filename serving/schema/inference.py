"""The Open Inference Protocol, version 2, for pictures and clips: what HTTP and gRPC share.

A request makes one picture or clip. Inputs are tensors of shape [1]; further fields of `ImageRequest`, `EditRequest` or
`VideoGenerationRequest` are parameters.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from serving.errors import APIError, invalid, shown_json
from serving.schema.answers import ImageAnswer
from serving.schema.edit_request import edit_order_from_fields, is_edit
from serving.schema.image_request import RecipeOf, order_from_fields
from serving.schema.models import ModelCard
from serving.schema.order import ImageOrder
from serving.schema.video_request import VideoFormat, video_order_from_fields
from tdm_runtime.errors import shown

SERVER = "tdm-serve"
PLATFORM = "tdm_diffusers"
VERSION = "1"
"""Version of every model; another checkpoint is another model."""
LAYOUTS = {"INT32": "<i", "INT64": "<q", "UINT64": "<Q"}
RAW = "raw"
"""Output format of bare frames."""
CLIP_FORMATS = (RAW, *get_args(VideoFormat))
BINARY_SIZE, BINARY, BINARY_OUTPUT = "binary_data_size", "binary_data", "binary_data_output"
"""Parameters of an input, of a wanted output and of a request about binary tensor data. gRPC, whose answers are binary,
passes them over: KServe's client sends them there too."""
LENGTH = struct.Struct("<I")


@dataclass(frozen=True)
class ModelTensors:
    """What requests to a model and its answers consist of."""

    made: str
    """What one request makes."""
    inputs: Mapping[str, tuple[str, ...]]
    """Input -> its datatypes; the model's metadata names the first."""
    outputs: Mapping[str, tuple[str, list[int]]]
    """Output -> its datatype and shape; -1 is any size."""
    parameters: tuple[str, ...]

    def described(self) -> tuple[list[TensorMetadata], list[TensorMetadata]]:
        """Return the metadata of inputs and outputs."""
        inputs = [TensorMetadata(name, types[0], [1]) for name, types in self.inputs.items()]
        return inputs, [TensorMetadata(name, *about) for name, about in self.outputs.items()]


@dataclass(frozen=True)
class InputTensor:
    """An input as its transport has read it."""

    name: str
    datatype: str
    shape: Sequence[int]
    elements: bytes | Sequence[Any]
    """Binary tensor data, or values."""
    place: str
    """Field of the request that holds values."""
    parameters: Collection[str] = ()
    """Names of its parameters."""


@dataclass(frozen=True)
class OutputTensor:
    """An output, before its transport writes it."""

    name: str
    datatype: str
    shape: list[int]
    content: bytes
    """Elements, little-endian, row by row."""

    def numbers(self) -> Sequence[int]:
        """Return the elements."""
        if self.datatype == "UINT8":
            return self.content
        return struct.unpack(LAYOUTS[self.datatype], self.content)


@dataclass(frozen=True)
class TensorMetadata:
    """Description of an input or output; -1 in a shape is any size."""

    name: str
    datatype: str
    shape: list[int]


WHOLE = ("INT32", "INT64")
FILES = ("image", "mask")
"""Inputs that are files; over HTTP in JSON, files in base64."""
NUMBERS: Mapping[str, tuple[str, list[int]]] = {"seed": ("INT64", [1]), "num_inference_steps": ("INT32", [1])}
PARAMETERS = (
    "size",
    "num_inference_steps",
    "min_inference_steps",
    "latency_budget_ms",
    "strict",
    "decoder",
    "prompt_syntax",
)
PICTURES = ModelTensors(
    "picture",
    {
        "prompt": ("BYTES",),
        "negative_prompt": ("BYTES",),
        "seed": ("INT64", "UINT64"),
        "num_inference_steps": WHOLE,
        **dict.fromkeys(FILES, ("BYTES",)),
    },
    {"generated_image": ("UINT8", [-1, -1, 3]), **NUMBERS},
    (*PARAMETERS, "strength"),
)
CLIPS = ModelTensors(
    "clip",
    {
        "prompt": ("BYTES",),
        "seed": ("INT64", "UINT64"),
        "num_inference_steps": WHOLE,
        "num_frames": WHOLE,
        "fps": WHOLE,
        "output_format": ("BYTES",),
    },
    {"generated_clip": ("UINT8", [-1, -1, -1, 3]), "encoded_clip": ("BYTES", [1]), **NUMBERS},
    (*PARAMETERS, "num_frames", "fps", "seconds", "output_format"),
)
"""An answer has either frames or a file, as `output_format` says; these are the tensors of Triton's model."""


def tensors_of(card: ModelCard) -> ModelTensors:
    """Return what requests to a model consist of."""
    return PICTURES if card.frames is None else CLIPS


def check_version(card: ModelCard, version: str) -> None:
    """Check that a model exists in this version; "" is any.

    Raises:
        APIError: 404, it does not.
    """
    if version not in ("", VERSION):
        message = f"version is {shown(version)}; {card.id} has {VERSION}"
        raise invalid(message, "model_version", "model_not_found", 404)


# -- requests --------------------------------------------------------------------------------------


def fields_of(model: ModelTensors, tensors: Iterable[InputTensor], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return inputs and parameters under the names of `ImageRequest`, `EditRequest` or `VideoGenerationRequest`.

    Raises:
        APIError: 400 naming the tensor or parameter, its value and the allowed values.
    """
    fields: dict[str, Any] = {}
    for tensor in tensors:
        _check(model, tensor)
        _add(fields, tensor.name, _element(tensor))
    for name, value in parameters.items():
        if name == BINARY_OUTPUT:
            continue
        if name not in model.parameters:
            known = ", ".join(model.parameters)
            raise invalid(f"{shown(name)} is no parameter; known are {known}", name[:64], "unknown_parameter")
        _add(fields, name, value)
    return fields


def order_of(model: ModelTensors, fields: dict[str, Any], recipe_of: RecipeOf) -> ImageOrder:
    """Return the order of fields that `fields_of` has read; a picture, and a clip unless it wants a file, as pixels.

    Decoding the picture of an edit takes a while, see `is_edit`.

    Raises:
        InvalidRequestError, APIError: a value is outside its limits.
    """
    if model is PICTURES:
        read = edit_order_from_fields if is_edit(fields) else order_from_fields
        return read(fields, recipe_of).as_pixels()
    is_file = is_clip_file(fields)
    fields = fields if is_file else {name: value for name, value in fields.items() if name != "output_format"}
    order = video_order_from_fields(fields, recipe_of)
    return order if is_file else order.as_pixels()


def is_clip_file(fields: Mapping[str, Any]) -> bool:
    """Return whether fields ask for a file and not for bare frames.

    Raises:
        APIError: 400, there is no such format.
    """
    asked = fields.get("output_format", RAW)
    if asked not in CLIP_FORMATS:
        raise refused(f"output_format is {shown(asked)}; a clip is {', '.join(CLIP_FORMATS)}", "output_format")
    return bool(asked != RAW)


def wanted_outputs(
    model: ModelTensors, outputs: Iterable[tuple[str, Collection[str]]], fields: Mapping[str, Any]
) -> list[str]:
    """Return the names of the requested outputs; all that the request makes if there are none.

    Args:
        outputs: names of the outputs, each with the names of its parameters.
        fields: fields of the request, of which a clip's output format decides between frames and file.

    Raises:
        APIError: 400, an output or one of its parameters is unknown, or the request does not make it.
    """
    absent = "" if model is PICTURES else "generated_clip" if is_clip_file(fields) else "encoded_clip"
    names: dict[str, None] = {}
    for name, parameters in outputs:
        if name == absent:
            message = f"{name} is not made with output_format {fields.get('output_format', RAW)}"
            raise refused(f"{message}; {RAW} makes generated_clip, the other formats encoded_clip", "outputs")
        if name not in model.outputs:
            known = ", ".join(model.outputs)
            raise invalid(f"{shown(name)} is no output; known are {known}", "outputs", "unknown_parameter")
        _check_parameters(name, parameters, BINARY)
        names[name] = None
    return list(names or [name for name in model.outputs if name != absent])


def refused(message: str, param: str) -> APIError:
    """Return the error of a tensor or parameter that cannot be read."""
    return invalid(message, param[:64], "invalid_value")


def _check(model: ModelTensors, tensor: InputTensor) -> None:
    types = model.inputs.get(tensor.name)
    if types is None:
        known = ", ".join(model.inputs)
        raise invalid(f"{shown(tensor.name)} is no input; known are {known}", tensor.name[:64], "unknown_parameter")
    if tensor.datatype not in types:
        message = f"the datatype of {tensor.name} is {shown(tensor.datatype)}; send {' or '.join(types)}"
        raise refused(message, tensor.name)
    if list(tensor.shape) != [1]:
        message = f"the shape of {tensor.name} is {shown(list(tensor.shape))}; it is [1], one {model.made} a call"
        raise refused(message, tensor.name)
    _check_parameters(tensor.name, tensor.parameters, BINARY_SIZE)


def _check_parameters(name: str, parameters: Collection[str], known: str) -> None:
    if unknown := sorted({*parameters} - {known}):
        message = f"{shown(unknown[0])} of {name} is not read (shared memory, classification); leave it out"
        raise refused(message, name)


def _element(tensor: InputTensor) -> str | int | bytes:
    """Return the one element of a tensor that has passed `_check`; of a file its bytes, or base64."""
    name, values = tensor.name, tensor.elements
    if isinstance(values, bytes):
        value: Any = _binary_element(name, tensor.datatype, values)
    elif len(values) == 1:
        value = values[0]
    else:
        found = f"{len(values)} in {tensor.place}" if values else "none"
        raise refused(f"the elements of {name} are {found}; send one in {tensor.place}", name)
    if isinstance(value, bytes):
        if name in FILES:
            return value
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise refused(f"{name} is not UTF-8 (byte {error.start}); encode it as UTF-8", name) from None
    wanted, kind = (str, "text") if tensor.datatype == "BYTES" else (int, "a whole number")
    if not isinstance(value, wanted) or isinstance(value, bool):
        raise refused(f"the element of {name} is {shown_json(value)}; {tensor.datatype} needs {kind}", name)
    return value


def _binary_element(name: str, datatype: str, raw: bytes) -> bytes | int:
    if datatype == "BYTES":
        if len(raw) < LENGTH.size or LENGTH.unpack_from(raw)[0] != len(raw) - LENGTH.size:
            message = f"raw contents of {name} ({len(raw)} bytes) are not one element with its length before it"
            raise refused(f"{message}; send its length as little-endian uint32, then the element", name)
        return raw[LENGTH.size :]
    size = struct.calcsize(LAYOUTS[datatype])
    if len(raw) != size:
        raise refused(f"raw contents of {name} have {len(raw)} bytes; one {datatype} has {size}", name)
    number: int = struct.unpack(LAYOUTS[datatype], raw)[0]
    return number


def _add(fields: dict[str, Any], name: str, value: Any) -> None:
    if name in fields:
        raise refused(f"{name} is sent twice; send it once", name)
    fields[name] = value


# -- answers ---------------------------------------------------------------------------------------


def output_tensors(answer: ImageAnswer, names: Iterable[str]) -> list[OutputTensor]:
    """Return a picture or clip and its numbers as the outputs that `names` has.

    The content is bare pixels, but for `encoded_clip` a file.
    """
    (made,) = answer.images
    frame, frames = [answer.height, answer.width, 3], made.receipt.frames
    outputs = {
        "generated_image": ("UINT8", frame, made.content),
        "generated_clip": ("UINT8", [frames or 1, *frame], made.content),
        "encoded_clip": ("BYTES", [1], LENGTH.pack(len(made.content)) + made.content),
        "seed": ("INT64", [1], struct.pack("<q", made.seed)),
        "num_inference_steps": ("INT32", [1], struct.pack("<i", made.num_inference_steps)),
    }
    return [OutputTensor(name, *outputs[name]) for name in names]


def answer_parameters(answer: ImageAnswer) -> dict[str, float | bool | str]:
    """Return further fields of an answer as parameters."""
    found: dict[str, float | bool | str] = {
        "total_ms": answer.timings.total_ms,
        "predicted_ms": answer.predicted_ms,
    }
    if answer.latency_budget_kept is not None:
        found["latency_budget_kept"] = answer.latency_budget_kept
    if answer.warnings:
        found["warnings"] = "; ".join(answer.warnings)
    return found
