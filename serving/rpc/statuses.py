"""Failures as gRPC tells them: a code, the message, and beside them what the HTTP body and headers would hold."""

from __future__ import annotations

import grpc
from google.protobuf.message import Message

from serving.errors import APIError, invalid

CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    499: grpc.StatusCode.CANCELLED,
    500: grpc.StatusCode.INTERNAL,
    501: grpc.StatusCode.UNIMPLEMENTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
"""HTTP status -> gRPC code."""
MAX_METADATA_CHARACTERS = 256

Metadata = tuple[tuple[str, str], ...]


def code_of(error: APIError) -> grpc.StatusCode:
    """The code of a failure; of a status without one of its own, whose fault it is."""
    fallback = grpc.StatusCode.INVALID_ARGUMENT if error.status < 500 else grpc.StatusCode.INTERNAL
    return CODES.get(error.status, fallback)


def trailers_of(error: APIError) -> Metadata:
    """Trailing metadata of a failure: `code`, `param` and when to come back."""
    headers = error.headers
    retry_ms = headers.get("retry-after-ms") or (f"{headers['retry-after']}000" if "retry-after" in headers else None)
    told = {
        "code": error.code,
        "param": error.param,
        "retry-after-ms": retry_ms,
        "x-should-retry": headers.get("x-should-retry"),
    }
    return tuple((name, printable(value)) for name, value in told.items() if value)


def printable(text: str) -> str:
    """As metadata may hold it: part of a client's own words may be in it."""
    shown = "".join(character if " " <= character <= "~" else "?" for character in text[:MAX_METADATA_CHARACTERS])
    return shown.strip()


def unreadable(kind: type[Message]) -> APIError:
    """Bytes that are not the message they should be."""
    name = kind.DESCRIPTOR.full_name
    return invalid(f"the call's bytes are no {name}; encode it with the .proto of this server", None, "invalid_message")
