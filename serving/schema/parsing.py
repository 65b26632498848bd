"""Decoding and checking of request bodies. No other module decodes what a client sends."""

from __future__ import annotations

import json
import re
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from serving.errors import APIError, invalid, shown_json
from serving.schema.hints import FIELDS, UNSUPPORTED

MAX_JSON_DEPTH = 16
MAX_MARKS = 4096
"""Most brackets and quotes of a body that brings pictures. Each costs time in Python, for which the engine waits."""
Body = TypeVar("Body", bound=BaseModel)


def parse_body(body: bytes, kind: type[Body]) -> Body:
    """Read a request body strictly.

    Raises:
        APIError: 400 naming the field, its value and the limit.
    """
    return validate(_parse_object(body), kind)


def parse_picture_body(body: bytes, kind: type[Body]) -> Body:
    """Read the body of a request that brings pictures.

    Raises:
        APIError: 400, see `parse_body` and `picture_fields`.
    """
    return validate(picture_fields(body), kind)


def picture_fields(body: bytes) -> dict[str, Any]:
    """Decode a body that may bring pictures, each of which is one long string.

    Raises:
        APIError: 400, the body is no JSON object or is large because of something else.
    """
    if (marks := sum(map(body.count, (b"{", b"[", b'"')))) > MAX_MARKS:
        message = f"the body has {marks} brackets and quotes; one that brings pictures has at most {MAX_MARKS}"
        raise invalid(message, None, "invalid_json")
    return _parse_object(body)


def validate(raw: dict[str, Any], kind: type[Body], is_text: bool = False) -> Body:
    """Check decoded fields. null means that a field is absent, as clients send what was not set.

    Args:
        is_text: whether every value is text, as in a CSV file; "4" is then a number where one is wanted.

    Raises:
        APIError: 400 naming the field, its value and the limit.
    """
    try:
        known = {name: value for name, value in raw.items() if value is not None or name not in kind.model_fields}
        return kind.model_validate(known, strict=False if is_text else None)
    except ValidationError as error:
        raise _from_validation(error, kind) from None


def nullable(schema: dict[str, Any]) -> None:
    """Say in a JSON schema that null means absent, for every field that may be left out."""
    for name, field in schema["properties"].items():
        kinds = field.get("anyOf", [])
        if name not in schema.get("required", ()) and {"type": "null"} not in kinds:
            about = {key: field.pop(key) for key in ("title", "description", "default") if key in field}
            schema["properties"][name] = {"anyOf": [field, {"type": "null"}], **about}


def _parse_object(body: bytes) -> dict[str, Any]:
    raw = parse_json(body)
    if not isinstance(raw, dict):
        raise invalid(f"the body is a JSON {type(raw).__name__}; send an object", None, "invalid_json")
    return raw


def parse_json(body: bytes) -> Any:
    """Decode JSON strictly. Parsers disagree on duplicate keys, NaN, deep nesting and invalid UTF-8; all are errors.

    Raises:
        APIError: 400 naming the mistake.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise invalid(f"the key {key[:64]!r} appears twice; send it once", key[:64], "invalid_json")
            found[key] = value
        return found

    def refuse_constant(name: str) -> None:
        raise invalid(f"{name} is not JSON; send a finite number", None, "invalid_json")

    try:
        text = body.decode("utf-8-sig")  # some clients write a byte order mark
        if _depth_exceeds(text, MAX_JSON_DEPTH):
            raise invalid(
                f"the body nests deeper than {MAX_JSON_DEPTH} levels; this API needs one", None, "invalid_json"
            )
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse_constant)
    except UnicodeDecodeError as error:
        raise invalid(f"the body is not UTF-8 (byte {error.start}); encode it as UTF-8", None, "invalid_json") from None
    except (json.JSONDecodeError, RecursionError, ValueError) as error:
        raise invalid(f"the body is not JSON: {str(error)[:120]}", None, "invalid_json") from None


def _depth_exceeds(text: str, limit: int) -> bool:
    """Return whether brackets outside strings nest deeper than `limit`."""
    depth = 0
    for token in re.finditer(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[{]|[\]}]', text, re.DOTALL):
        if token[0] in "[{":
            depth += 1
            if depth > limit:
                return True
        elif token[0] in "]}":
            depth -= 1
    return False


def _from_validation(error: ValidationError, kind: type[BaseModel]) -> APIError:
    """Return Pydantic's first error as an API error whose `param` is the field."""
    first, *others = error.errors(include_url=False)
    param = str(first["loc"][0])  # no field has fields of its own; further parts name a member of a union
    if first["type"] == "missing":
        return invalid(f"{param} is required", param, "missing_required_parameter")
    if first["type"] == "extra_forbidden":
        if (meant := FIELDS.get(param)) is not None and meant.partition(",")[0].split()[0] in kind.model_fields:
            return invalid(f"{param!r} is not a parameter; send {meant}", param, "unknown_parameter")
        if (why := UNSUPPORTED.get(param)) is not None:
            return invalid(f"{param!r} is not supported: {why}; leave it out", param, "unknown_parameter")
        known = ", ".join(kind.model_fields)
        return invalid(f"{param[:64]!r} is not a parameter; known are {known}", param[:64], "unknown_parameter")
    reasons = [first["msg"], *(other["msg"] for other in others if other["loc"][0] == param)]
    reason = " or ".join(reason[:1].lower() + reason[1:] for reason in reasons)
    return invalid(f"{param} is {shown_json(first['input'])}; {reason}", param, "invalid_value")
