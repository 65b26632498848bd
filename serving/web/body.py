"""Reads request bodies within limits of size, time and media type."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Collection
from typing import Any, NamedTuple

from fastapi import Request
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from serving.config import ServerConfig
from serving.errors import CLIENT_CLOSED_REQUEST, APIError, invalid

MAX_FORM_FIELDS = 32


class Form(NamedTuple):
    """A multipart form."""

    fields: dict[str, Any]
    """Text of each field, or bytes of a file; several files of one name are a list."""
    body: bytes
    """Body of the request."""


async def read_json(request: Request, config: ServerConfig, max_bytes: int | None = None) -> bytes:
    """Return the bytes of a JSON body.

    Args:
        max_bytes: see `read_bytes`.

    Raises:
        APIError: 408, 413 or 415.
    """
    check_media_type(request, "application/json")
    return await read_bytes(request, config, max_bytes)


async def read_form(request: Request, config: ServerConfig, files: Collection[str] = ()) -> Form:
    """Return the fields of a multipart form.

    Args:
        files: names of the fields that may hold pictures. Clients also write them as "image[]".

    Raises:
        APIError: 400, 408, 413 or 415.
    """
    body = await read_bytes(request, config, config.max_picture_body_bytes if files else None)

    async def parts() -> AsyncGenerator[bytes, None]:
        yield body

    try:
        form = await MultiPartParser(
            request.headers, parts(), max_files=MAX_FORM_FIELDS, max_fields=MAX_FORM_FIELDS
        ).parse()
    except MultiPartException as error:
        raise invalid(f"the form cannot be read: {error.message}", None, "invalid_form") from None
    found: dict[str, str | bytes | list[bytes]] = {}
    for name, value in form.multi_items():
        if isinstance(value, str):
            if name in found:
                raise invalid(f"the field {name[:64]!r} appears twice; send it once", name[:64], "invalid_form")
            found[name] = value
            continue
        if (bare := name.removesuffix("[]")) not in files:
            message = f"{name[:64]!r} is a file, which is not supported: no picture or clip is read here; leave it out"
            raise invalid(message, name[:64], "invalid_form")
        content, known = await value.read(), found.get(bare)
        found[bare] = content if known is None else [*_files(known, bare), content]
    return Form(found, body)


def _files(known: str | bytes | list[bytes], name: str) -> list[bytes]:
    """Return the files of a field that were read before another one."""
    if isinstance(known, str):
        raise invalid(f"the field {name!r} is text and a file; send one of them", name, "invalid_form")
    return known if isinstance(known, list) else [known]


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
