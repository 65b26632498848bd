"""GET /v1/files: what was made and is kept for a while. The id is the key to it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator

from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse

from serving.config import ServerConfig
from serving.errors import APIError
from serving.fronts.services import Services
from serving.jobs.artifacts import ArtifactStore


def add_file_routes(app: FastAPI, services: Services) -> None:
    """Kept files."""
    answers = {200: {"content": {"application/octet-stream": {}}}, 404: {"description": "Unknown, or expired."}}

    @app.get("/v1/files/{file_id}", responses=answers, response_class=Response)  # type: ignore[arg-type]
    @app.get("/v1/files/{file_id}/content", responses=answers, response_class=Response)  # type: ignore[arg-type]
    async def get_file(file_id: str, request: Request) -> Response:
        """Fetch a file, or one range of its bytes."""
        return await file_response(services.artifacts, file_id, request)


async def file_response(artifacts: ArtifactStore, file_id: str, request: Request) -> Response:
    """A kept file as an answer.

    Raises:
        APIError: 404, there is none of that id; 416, no bytes in that range.
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
    return StreamingResponse(content, status, headers, found.media_type)  # reads on threads


def _range(header: str, num_bytes: int) -> tuple[int, int] | None:
    """The first byte and the one behind the last of a single range; players seek by it. None for the whole file.

    Raises:
        APIError: 416, there are no such bytes.
    """
    match = re.fullmatch(r"bytes=([0-9]{0,15})-([0-9]{0,15})", header.strip(), re.ASCII)
    if match is None or match[1] == match[2] == "":
        return None  # as the standard has it: what is not understood is ignored
    if match[1] == "":
        start, end = max(0, num_bytes - int(match[2])), num_bytes
    else:
        start, end = int(match[1]), min(num_bytes, int(match[2]) + 1 if match[2] else num_bytes)
    if start >= end:
        message = f"range {header[:64]!r} has none of the file's {num_bytes} bytes"
        headers = {"content-range": f"bytes */{num_bytes}", "x-should-retry": "false"}
        raise APIError(416, message, code="range_not_satisfiable", headers=headers)
    return start, end


def base_url(request: Request, config: ServerConfig) -> str:
    """What this server's URLs begin with, as the client knows it."""
    return config.public_url or str(request.base_url).rstrip("/")
