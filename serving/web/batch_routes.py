"""/v1/batches: many requests of pictures and clips as one job."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import FastAPI, Query, Request

from serving.fronts.services import Services
from serving.jobs.job import JobRequest
from serving.schema.batch_line import BatchLine
from serving.web.batch_schema import MAX_BATCH_BYTES, Batch, BatchList, BatchRequest, read_batch, to_batch
from serving.web.body import check_media_type, read_bytes
from serving.web.documentation import documented_body
from serving.web.file_routes import base_url
from serving.web.http_edge import caller_of
from serving.web.job_routes import MAX_PAGE, create_job

JSON_LINES = ("application/jsonl", "application/x-ndjson")
DOCUMENTED_BODY = documented_body(json=BatchRequest.model_json_schema(), jsonl=BatchLine.model_json_schema())


def add_batch_routes(app: FastAPI, services: Services) -> None:
    """Add the routes of batches."""
    max_live = services.config.engine.max_live

    @app.post("/v1/batches", openapi_extra=DOCUMENTED_BODY)
    async def create_batch(request: Request) -> Batch:
        """Accept requests of pictures and clips, all or none, and answer them in the background."""
        is_lines = request.headers.get("content-type", "").split(";")[0].strip().lower() in JSON_LINES
        if not is_lines:
            check_media_type(request, "application/json")
        body = await read_bytes(request, services.config, MAX_BATCH_BYTES)
        batch = await asyncio.to_thread(read_batch, body, is_lines, services.images.recipe, max_live)
        about = {"metadata": batch.metadata, "endpoint": batch.endpoint}
        job_request = about | {"base_url": base_url(request)}
        asked = JobRequest("batch", caller_of(request).name, batch.model, job_request, batch.parts)
        return to_batch(await create_job(request, services, asked, batch.cost, body))

    @app.get("/v1/batches")
    async def list_batches(
        request: Request,
        after: Annotated[str | None, Query(max_length=64)] = None,
        limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 20,
    ) -> BatchList:
        """List the caller's batches, the newest first."""
        found = await services.jobs.page("batch", caller_of(request).name, after, limit + 1, True)
        data = [to_batch(job) for job in found[:limit]]
        return BatchList(
            data=data,
            first_id=data[0].id if data else None,
            last_id=data[-1].id if data else None,
            has_more=len(found) > limit,
        )

    @app.get("/v1/batches/{batch_id}")
    async def get_batch(batch_id: str, request: Request) -> Batch:
        """Return the progress of a batch and, once it is completed, the ids of its files."""
        return to_batch(await services.jobs.get("batch", caller_of(request).name, batch_id))

    @app.post("/v1/batches/{batch_id}/cancel")
    async def cancel_batch(batch_id: str, request: Request) -> Batch:
        """Cancel a batch and delete its results."""
        return to_batch(await services.jobs.cancel("batch", caller_of(request).name, batch_id))
