"""Request and response of POST /v2/models/{name}/infer: JSON, with or without binary tensor data after it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from serving.errors import invalid, shown_json
from serving.schema.answers import ImageAnswer
from serving.schema.inference import (
    BINARY,
    BINARY_OUTPUT,
    BINARY_SIZE,
    CLIPS,
    PICTURES,
    VERSION,
    InputTensor,
    ModelTensors,
    OutputTensor,
    answer_parameters,
    fields_of,
    output_tensors,
    refused,
    wanted_outputs,
)
from serving.schema.parsing import nullable, parse_picture_body, validate
from tdm_runtime.errors import shown

JSON_LENGTH = "inference-header-content-length"
"""Header with the number of bytes of JSON, where binary tensor data follows it."""
NUMERALS = [str(number) for number in range(256)]
ROW = 4096
"""Number of elements that are written as text at a time. Other threads may run in between."""


class InferInput(BaseModel):
    """An input of a request."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra=nullable)

    name: str = Field(json_schema_extra={"enum": [*{**PICTURES.inputs, **CLIPS.inputs}]})
    datatype: str
    shape: list[int] = Field(description="[1]: a request makes one picture or clip.")
    parameters: dict[str, Any] = Field(
        default={}, description="`binary_data_size`: number of bytes of this input after the JSON, in place of `data`."
    )
    data: list[Any] | None = Field(
        None, description="The element: text for BYTES, of a file base64; else a whole number."
    )


class InferOutput(BaseModel):
    """An output that the client wants."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra=nullable)

    name: str = Field(json_schema_extra={"enum": [*{**PICTURES.outputs, **CLIPS.outputs}]})
    parameters: dict[str, Any] = Field(
        default={}, description="`binary_data`: whether its elements follow the JSON of the answer."
    )


class InferBody(BaseModel):
    """JSON of a request."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra=nullable)

    id: str = Field("", description="Returned with the answer.")
    model_name: str | None = Field(None, description="The name in the path, as KServe's client repeats it.")
    parameters: dict[str, Any] = Field(
        default={},
        description="Fields of image or video requests; `binary_data_output` is the default of `binary_data`.",
    )
    inputs: list[dict[str, Any]] = Field(
        description="Tensors: prompt and, optionally, others that the model's metadata names.",
        json_schema_extra={"minItems": 1, "items": InferInput.model_json_schema()},
    )
    outputs: list[dict[str, Any]] = Field(
        default=[],
        description="Tensors that the answer has; all by default.",
        json_schema_extra={"items": InferOutput.model_json_schema()},
    )


class AnsweredTensor(BaseModel):
    """An output of an answer."""

    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, Any] = {}
    """`binary_data_size`, if the elements follow the JSON."""
    data: list[int] | None = None


class InferResponse(BaseModel):
    """JSON of an answer."""

    model_name: str
    model_version: str
    id: str = ""
    """Absent if the request has none."""
    parameters: dict[str, Any]
    outputs: list[AnsweredTensor]


@dataclass(frozen=True)
class InferRequest:
    """A request that has been read."""

    id: str
    fields: dict[str, Any]
    """Fields of `ImageRequest` or `VideoGenerationRequest`."""
    outputs: list[str]
    binary_outputs: frozenset[str]
    """Outputs whose elements follow the JSON of the answer."""


def read_infer(body: bytes, model: str, json_length: str | None, kind: ModelTensors) -> InferRequest:
    """Read the body of an inference request.

    Args:
        kind: tensors of the model.
        json_length: header `JSON_LENGTH`; None if all of the body is JSON.

    Raises:
        APIError: 400 naming the field, tensor or parameter, its value and the allowed values.
    """
    end = len(body) if json_length is None else _length(json_length, len(body))
    read = parse_picture_body(body[:end], InferBody)
    if read.model_name not in (None, model):
        message = f"model_name is {shown(read.model_name)} and the path names {shown(model)}; send the same, or neither"
        raise refused(message, "model_name")
    tensors = _input_tensors([validate(each, InferInput) for each in read.inputs], body[end:])
    wanted = [validate(each, InferOutput) for each in read.outputs]
    fields = fields_of(kind, tensors, read.parameters) | {"model": model}
    names = wanted_outputs(kind, ((output.name, output.parameters) for output in wanted), fields)
    is_binary = dict.fromkeys(names, _flag(read.parameters, BINARY_OUTPUT, False))
    is_binary |= {each.name: _flag(each.parameters, BINARY, is_binary[each.name]) for each in wanted}
    if not is_binary.get("encoded_clip", True):
        message = f"encoded_clip is a file, which JSON cannot hold; ask for it with {BINARY} or {BINARY_OUTPUT} true"
        raise refused(message, "outputs")
    return InferRequest(read.id, fields, names, frozenset(name for name in names if is_binary[name]))


def _length(given: str, most: int) -> int:
    """Return the number of bytes of JSON."""
    if not (given.isascii() and given.isdigit() and len(given) < 10 and int(given) <= most):
        message = f"{JSON_LENGTH} is {shown_json(given)}; send the number of bytes of JSON, 0 to {most} in this body"
        raise refused(message, JSON_LENGTH)
    return int(given)


def _flag(parameters: dict[str, Any], name: str, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise refused(f"{name} is {shown_json(value)}; send true or false", name)
    return value


def _input_tensors(inputs: list[InferInput], binary: bytes) -> list[InputTensor]:
    """Return the inputs, each with its part of the binary tensor data."""
    tensors, start = [], 0
    for each in inputs:
        size = each.parameters.get(BINARY_SIZE)
        elements: bytes | list[Any] = each.data or []
        if size is not None:
            if each.data is not None:
                raise refused(f"{shown(each.name)} has data beside {BINARY_SIZE}; send one of them", each.name)
            if type(size) is not int or not 0 <= size <= len(binary) - start:
                message = f"{BINARY_SIZE} of {shown(each.name)} is {shown(size)}; {len(binary) - start} bytes are left"
                raise refused(f"{message} after the JSON, whose length is the header {JSON_LENGTH}", each.name)
            elements = binary[start : start + size]
            start += size
        tensors.append(InputTensor(each.name, each.datatype, each.shape, elements, "data", each.parameters))
    if start != len(binary):
        message = f"{len(binary) - start} bytes follow the inputs; the sum of {BINARY_SIZE} must be {len(binary)}"
        raise invalid(message, "inputs", "invalid_value")
    return tensors


def to_body(answer: ImageAnswer, asked: InferRequest) -> tuple[bytes, int | None]:
    """Return the body of an answer, and the length of its JSON if binary tensor data follows. May take a while.

    Pixels as JSON are 3 to 4 times as long as in binary.
    """
    outputs, binary = [], []
    for tensor in output_tensors(answer, asked.outputs):
        about: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": tensor.shape}
        if tensor.name in asked.binary_outputs:
            binary.append(tensor.content)
            outputs.append(json.dumps(about | {"parameters": {BINARY_SIZE: len(tensor.content)}}))
        else:
            outputs.append(f'{json.dumps(about)[:-1]}, "data": [{",".join(_written(tensor))}]}}')
    head = {"model_name": answer.model, "model_version": VERSION, "parameters": answer_parameters(answer)}
    if asked.id:
        head["id"] = asked.id
    text = f'{json.dumps(head)[:-1]}, "outputs": [{", ".join(outputs)}]}}'.encode()
    return b"".join([text, *binary]), len(text) if binary else None


def _written(tensor: OutputTensor) -> Iterator[str]:
    """Yield the elements of an output as text, a row at a time."""
    numbers: Iterable[int] = tensor.numbers()
    if not isinstance(numbers, bytes):
        yield ",".join(map(str, numbers))
        return
    for start in range(0, len(numbers), ROW):
        yield ",".join([NUMERALS[number] for number in numbers[start : start + ROW]])
