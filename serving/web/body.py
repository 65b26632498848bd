"""Reads request bodies within limits of size, time and media type."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from fastapi import Request
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from serving.config import ServerConfig
from serving.errors import CLIENT_CLOSED_REQUEST, APIError, invalid

MAX_FORM_FIELDS = 32


async def read_json(request: Request, config: ServerConfig) -> bytes:
    """Return the bytes of a JSON body.

    Raises:
        APIError: 408, 413 or 415.
    """
    check_media_type(request, "application/json")
    return await read_bytes(request, config)


async def read_form(request: Request, config: ServerConfig) -> dict[str, str]:
    """Return the text fields of a multipart form.

    Raises:
        APIError: 400, 408, 413 or 415.
    """
    body = await read_bytes(request, config)

    async def parts() -> AsyncGenerator[bytes, None]:
        yield body

    try:
        form = await MultiPartParser(
            request.headers, parts(), max_files=MAX_FORM_FIELDS, max_fields=MAX_FORM_FIELDS
        ).parse()
    except MultiPartException as error:
        raise invalid(f"the form cannot be read: {error.message}", None, "invalid_form") from None
    found: dict[str, str] = {}
    for name, value in form.multi_items():
        if name in found:
            raise invalid(f"the field {name[:64]!r} appears twice; send it once", name[:64], "invalid_form")
        if not isinstance(value, str):
            message = f"{name[:64]!r} is a file, which is not supported: no picture or clip is read here; leave it out"
            raise invalid(message, name[:64], "invalid_form")
        found[name] = value
    return found


async def read_bytes(request: Request, config: ServerConfig, max_bytes: int | None = None) -> bytes:
    """Return the bytes of a body of any media type.

    Args:
        max_bytes: largest allowed size. None takes the configuration's.

    Raises:
        APIError: 408, 413 or 415.
    """
    encoding = request.headers.get("content-encoding", "identity")
    if encoding != "identity":
        message = f"content-encoding is {encoding[:32]!r}; send the body without encoding"
        raise invalid(message, None, "unsupported_encoding", 415)
    chunks, size, most = [], 0, max_bytes or config.max_body_bytes
    try:
        async with asyncio.timeout(config.body_timeout_s):
            async for chunk in request.stream():
                size += len(chunk)
                if size > most:
                    message = f"the body is larger than {most} bytes; shorten the prompt, or send less at once"
                    raise invalid(message, None, "body_too_large", 413)
                chunks.append(chunk)
    except TimeoutError:
        message = f"the body did not arrive within {config.body_timeout_s:g} s; send it at once"
        raise APIError(408, message, "invalid_request_error", code="body_timeout") from None
    except ClientDisconnect:
        raise APIError(CLIENT_CLOSED_REQUEST, "the client left while sending", code="client_closed") from None
    return b"".join(chunks)


def check_media_type(request: Request, wanted: str) -> None:
    """Check the media type of a body; a request that does not name one passes.

    Raises:
        APIError: 415, the body has another media type.
    """
    media_type = request.headers.get("content-type", wanted).split(";")[0].strip().lower()
    if media_type != wanted:
        message = f"content-type is {media_type[:64]!r}; send {wanted}"
        raise invalid(message, None, "unsupported_media_type", 415)
