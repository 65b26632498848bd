"""The Open Inference Protocol, version 2, for pictures: what HTTP and gRPC share.

A request makes one picture. Inputs are tensors of shape [1]; further fields of `ImageRequest` are parameters.
"""

from __future__ import annotations

import importlib.metadata
import struct
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from serving.errors import APIError, invalid, shown_json
from serving.schema.answers import ImageAnswer
from serving.schema.models import ModelCard
from tdm_runtime.errors import shown

SERVER = "tdm-serve"
PLATFORM = "tdm_diffusers"
VERSION = "1"
"""Version of every model; another checkpoint is another model."""
INPUTS = {
    "prompt": ("BYTES",),
    "negative_prompt": ("BYTES",),
    "seed": ("INT64", "UINT64"),
    "num_inference_steps": ("INT32", "INT64"),
}
"""Input -> its datatypes; a model's metadata names the first."""
OUTPUTS = {"generated_image": "UINT8", "seed": "INT64", "num_inference_steps": "INT32"}
LAYOUTS = {"INT32": "<i", "INT64": "<q", "UINT64": "<Q"}
PARAMETERS = ("size", "num_inference_steps", "min_inference_steps", "latency_budget_ms", "strict", "decoder")
BINARY_SIZE, BINARY, BINARY_OUTPUT = "binary_data_size", "binary_data", "binary_data_output"
"""Parameters of an input, of a wanted output and of a request about binary tensor data. gRPC, whose answers are binary,
passes them over: KServe's client sends them there too."""
LENGTH = struct.Struct("<I")


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


INPUT_METADATA = [TensorMetadata(name, types[0], [1]) for name, types in INPUTS.items()]
OUTPUT_METADATA = [
    TensorMetadata(name, datatype, [-1, -1, 3] if name == "generated_image" else [1])
    for name, datatype in OUTPUTS.items()
]


def check_version(card: ModelCard, version: str) -> None:
    """Check that a model exists in this version; "" is any.

    Raises:
        APIError: 404, it does not.
    """
    if version not in ("", VERSION):
        message = f"version is {shown(version)}; {card.id} has {VERSION}"
        raise invalid(message, "model_version", "model_not_found", 404)


def server_version() -> str:
    """Return the version of this package."""
    try:
        return importlib.metadata.version("tdm-serve")
    except importlib.metadata.PackageNotFoundError:  # the package is not installed
        return "unknown"


# -- requests --------------------------------------------------------------------------------------


def fields_of(tensors: Iterable[InputTensor], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return inputs and parameters under the names of `ImageRequest`.

    Raises:
        APIError: 400 naming the tensor or parameter, its value and the allowed values.
    """
    fields: dict[str, Any] = {}
    for tensor in tensors:
        _check(tensor)
        _add(fields, tensor.name, _element(tensor))
    for name, value in parameters.items():
        if name == BINARY_OUTPUT:
            continue
        if name not in PARAMETERS:
            known = ", ".join(PARAMETERS)
            raise invalid(f"{shown(name)} is no parameter; known are {known}", name[:64], "unknown_parameter")
        _add(fields, name, value)
    return fields


def wanted_outputs(outputs: Iterable[tuple[str, Collection[str]]]) -> list[str]:
    """Return the names of the requested outputs; all if there are none.

    Args:
        outputs: names of the outputs, each with the names of its parameters.

    Raises:
        APIError: 400, an output or one of its parameters is unknown.
    """
    names: dict[str, None] = {}
    for name, parameters in outputs:
        if name not in OUTPUTS:
            known = ", ".join(OUTPUTS)
            raise invalid(f"{shown(name)} is no output; known are {known}", "outputs", "unknown_parameter")
        _check_parameters(name, parameters, BINARY)
        names[name] = None
    return list(names or OUTPUTS)


def refused(message: str, param: str) -> APIError:
    """Return the error of a tensor or parameter that cannot be read."""
    return invalid(message, param[:64], "invalid_value")


def _check(tensor: InputTensor) -> None:
    types = INPUTS.get(tensor.name)
    if types is None:
        known = ", ".join(INPUTS)
        raise invalid(f"{shown(tensor.name)} is no input; known are {known}", tensor.name[:64], "unknown_parameter")
    if tensor.datatype not in types:
        message = f"the datatype of {tensor.name} is {shown(tensor.datatype)}; send {' or '.join(types)}"
        raise refused(message, tensor.name)
    if list(tensor.shape) != [1]:
        message = f"the shape of {tensor.name} is {shown(list(tensor.shape))}; it is [1], one picture a call"
        raise refused(message, tensor.name)
    _check_parameters(tensor.name, tensor.parameters, BINARY_SIZE)


def _check_parameters(name: str, parameters: Collection[str], known: str) -> None:
    if unknown := sorted({*parameters} - {known}):
        message = f"{shown(unknown[0])} of {name} is not read (shared memory, classification); leave it out"
        raise refused(message, name)


def _element(tensor: InputTensor) -> str | int:
    """Return the one element of a tensor that has passed `_check`."""
    name, values = tensor.name, tensor.elements
    if isinstance(values, bytes):
        value: Any = _binary_element(name, tensor.datatype, values)
    elif len(values) == 1:
        value = values[0]
    else:
        found = f"{len(values)} in {tensor.place}" if values else "none"
        raise refused(f"the elements of {name} are {found}; send one in {tensor.place}", name)
    if isinstance(value, bytes):
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
    """Return a picture, made as bare pixels, and its numbers as the outputs that `names` has."""
    (image,) = answer.images
    made = {
        "generated_image": ([answer.height, answer.width, 3], image.content),
        "seed": ([1], struct.pack("<q", image.seed)),
        "num_inference_steps": ([1], struct.pack("<i", image.num_inference_steps)),
    }
    return [OutputTensor(name, OUTPUTS[name], *made[name]) for name in names]


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
