"""Many requests of pictures and clips as one job."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from serving.errors import from_exception, retry_after_s
from serving.images.interface import Images
from serving.jobs.artifacts import ArtifactStore
from serving.jobs.job import FinishedPart, Job, Part
from serving.schema import image_response, video_response
from serving.schema.batch_line import IMAGES, VIDEOS, background_order


class BatchRenderer:
    """Makes batches. A part is one request, and its content is one line of the output."""

    def __init__(self, images: Images, artifacts: ArtifactStore, keep_s: float) -> None:
        self._images = images
        self._artifacts = artifacts
        self._keep_s = keep_s

    def num_pictures(self, part: Part) -> int:
        """Return the number of pictures that the request asks for."""
        return int(part.request["body"].get("n", 1))

    async def make(self, job: Job, part: Part) -> FinishedPart:
        """Answer one request. An error is an answer too.

        Raises:
            Exception: the server is busy; `retry_after_s` returns how long to wait.
        """
        try:
            status, body = 200, await self._answer(job, part)
        except Exception as error:
            if retry_after_s(error) is not None:
                raise
            failure = from_exception(error)
            status, body = failure.status, failure.to_body()
        line = {
            "id": f"{job.id}-{part.position}",
            "custom_id": part.request["custom_id"],
            "response": {"status_code": status, "request_id": f"{job.id}-{part.position}", "body": body},
            "error": None,
        }
        return FinishedPart(part.position, json.dumps(line).encode() + b"\n", is_failed=status != 200)

    async def _answer(self, job: Job, part: Part) -> Any:
        url = part.request.get("url", IMAGES)  # version 0.1 stored none
        order = await asyncio.to_thread(background_order, url, part.request["body"], self._images.recipe)
        to_response = video_response.to_response if url == VIDEOS else image_response.to_response
        answer = await self._images.generate(order.in_background())
        if order.encoding.response_format == "b64_json":
            return to_response(answer, None, None).model_dump()
        base_url = job.request["base_url"]
        published = await asyncio.to_thread(self._artifacts.publish, answer, base_url, self._keep_s)
        return to_response(answer, *published).model_dump()

    def finish(self, job: Job, parts: Callable[[], Iterator[FinishedPart]]) -> dict[str, Any]:
        """Write answers to one file and errors to another. Returns the ids of both; None for a file without lines."""
        return {
            "output_file_id": self._file(part.content for part in parts() if not part.is_failed),
            "error_file_id": self._file(part.content for part in parts() if part.is_failed),
        }

    def discard(self, result: Mapping[str, Any]) -> None:
        for name in filter(None, result.values()):
            self._artifacts.delete(name)

    def _file(self, lines: Iterator[bytes]) -> str | None:
        first = next(lines, None)
        if first is None:
            return None

        def all_lines() -> Iterator[bytes]:
            yield first
            yield from lines

        return self._artifacts.put(all_lines(), "jsonl", int(time.time() + self._keep_s))
