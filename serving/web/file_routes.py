"""GET /v1/files: files that the server keeps for a limited time. Knowing the id is permission to read the file."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator

from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse

from serving.errors import APIError
from serving.fronts.services import Services
from serving.jobs.artifacts import ArtifactStore


def add_file_routes(app: FastAPI, services: Services) -> None:
    """Add the routes of files."""
    answers = {200: {"content": {"application/octet-stream": {}}}, 404: {"description": "Unknown, or expired."}}

    @app.get("/v1/files/{file_id}", responses=answers, response_class=Response)  # type: ignore[arg-type]
    @app.get("/v1/files/{file_id}/content", responses=answers, response_class=Response)  # type: ignore[arg-type]
    async def get_file(file_id: str, request: Request) -> Response:
        """Fetch a file, or one range of its bytes."""
        return await file_response(services.artifacts, file_id, request)


async def file_response(artifacts: ArtifactStore, file_id: str, request: Request) -> Response:
    """Return the response that sends a file.

    Raises:
        APIError: 404, no file has this id; 416, the file has no bytes in the range.
    """
    found = await asyncio.to_thread(artifacts.find, file_id)
    headers = {"cache-control": f"private, max-age={found.remaining_s}", "accept-ranges": "bytes"}
    start, end = 0, found.num_bytes
    status = 200
    if (asked := _range(request.headers.get("range", ""), found.num_bytes)) is not None:
        start, end = asked
        status = 206
        headers["content-range"] = f"bytes {start}-{end - 1}/{found.num_bytes}"
    headers["content-length"] = str(end - start)
    content: Iterator[bytes] = artifacts.read(found.id, start, end)
    return StreamingResponse(content, status, headers, found.media_type)  # Starlette reads it on a thread


def _range(header: str, num_bytes: int) -> tuple[int, int] | None:
    """Return start and end of a range header, end exclusive; None for the whole file. Video players seek with it.

    Raises:
        APIError: 416, the file has no bytes in the range.
    """
    match = re.fullmatch(r"bytes=([0-9]{0,15})-([0-9]{0,15})", header.strip(), re.ASCII)
    if match is None or match[1] == match[2] == "":
        return None  # RFC 9110: a server ignores a range header that it does not understand
    if match[1] == "":
        start, end = max(0, num_bytes - int(match[2])), num_bytes
    else:
        start, end = int(match[1]), min(num_bytes, int(match[2]) + 1 if match[2] else num_bytes)
    if start >= end:
        message = f"range {header[:64]!r} has none of the file's {num_bytes} bytes"
        headers = {"content-range": f"bytes */{num_bytes}", "x-should-retry": "false"}
        raise APIError(416, message, code="range_not_satisfiable", headers=headers)
    return start, end


def base_url(request: Request) -> str:
    """Return the beginning of this server's URLs, as the client reaches it."""
    return str(request.base_url).rstrip("/")
