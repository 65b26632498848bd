"""Errors as gRPC statuses: a code, a message, and trailing metadata with what HTTP's body and headers would hold."""

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
    """Return the gRPC code of an error. Other statuses become INVALID_ARGUMENT below 500 and INTERNAL from 500 on."""
    fallback = grpc.StatusCode.INVALID_ARGUMENT if error.status < 500 else grpc.StatusCode.INTERNAL
    return CODES.get(error.status, fallback)


def trailers_of(error: APIError) -> Metadata:
    """Return the trailing metadata of an error: `code`, `param` and when to retry."""
    headers = error.headers
    retry_ms = headers.get("retry-after-ms") or (f"{headers['retry-after']}000" if "retry-after" in headers else None)
    values = {
        "code": error.code,
        "param": error.param,
        "retry-after-ms": retry_ms,
        "x-should-retry": headers.get("x-should-retry"),
    }
    return tuple((name, printable(value)) for name, value in values.items() if value)


def printable(text: str) -> str:
    """Return the text with only characters that metadata allows; it may quote the client."""
    shown = "".join(character if " " <= character <= "~" else "?" for character in text[:MAX_METADATA_CHARACTERS])
    return shown.strip()


def unreadable(kind: type[Message]) -> APIError:
    """Return the error of a message that cannot be decoded."""
    name = kind.DESCRIPTOR.full_name
    return invalid(
        f"the call's bytes cannot be decoded as {name}; encode it with this server's .proto", None, "invalid_message"
    )
