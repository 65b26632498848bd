"""Reading bodies within limits of size, time and kind."""

from __future__ import annotations

import asyncio

from fastapi import Request
from starlette.requests import ClientDisconnect

from serving.config import ServerConfig
from serving.errors import APIError, invalid

CLIENT_CLOSED_REQUEST = 499


async def read_json(request: Request, config: ServerConfig) -> bytes:
    """Read a JSON body, undecoded.

    Raises:
        APIError: 408, 413 or 415.
    """
    check_media_type(request, "application/json")
    return await read_bytes(request, config)


async def read_bytes(request: Request, config: ServerConfig) -> bytes:
    """Read a body of any kind.

    Raises:
        APIError: 408, 413 or 415.
    """
    encoding = request.headers.get("content-encoding", "identity")
    if encoding != "identity":
        message = f"content-encoding {encoding[:32]!r} is not read; send it plain"
        raise invalid(message, None, "unsupported_encoding", 415)
    chunks, size = [], 0
    try:
        async with asyncio.timeout(config.body_timeout_s):
            async for chunk in request.stream():
                size += len(chunk)
                if size > config.max_body_bytes:
                    message = f"the body is larger than {config.max_body_bytes} bytes; shorten the prompt"
                    raise invalid(message, None, "body_too_large", 413)
                chunks.append(chunk)
    except TimeoutError:
        message = f"the body did not arrive within {config.body_timeout_s:g} s; send it at once"
        raise APIError(408, message, "invalid_request_error", code="body_timeout") from None
    except ClientDisconnect:
        raise APIError(CLIENT_CLOSED_REQUEST, "the client left while sending", code="client_closed") from None
    return b"".join(chunks)


def check_media_type(request: Request, wanted: str) -> None:
    """
    Raises:
        APIError: 415, the body is of another kind; none is taken to be the wanted one.
    """
    media_type = request.headers.get("content-type", wanted).split(";")[0].strip().lower()
    if media_type != wanted:
        message = f"content-type {media_type[:64]!r} is not read; send {wanted}"
        raise invalid(message, None, "unsupported_media_type", 415)
