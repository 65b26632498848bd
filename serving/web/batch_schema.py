"""Requests and responses of /v1/batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from serving.errors import APIError, invalid
from serving.jobs.job import Job
from serving.schema.batch_line import IMAGES, BatchLine, Endpoint, background_order, read_batch_line
from serving.schema.image_request import RecipeOf
from serving.schema.parsing import nullable, parse_body
from tdm_runtime.errors import InvalidRequestError

MAX_REQUESTS = 1000
MAX_BATCH_BYTES = 8 * 2**20
MAX_NAMED = 5
"""Most bad requests that an error message names."""


class BatchRequest(BaseModel):
    """Body of POST /v1/batches as JSON."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra=nullable)

    endpoint: Endpoint = Field(IMAGES, description="The url of requests that have none.")
    requests: list[dict[str, Any]] = Field(
        description=f"1..{MAX_REQUESTS} of {{custom_id, url, body}}.",
        json_schema_extra={"minItems": 1, "maxItems": MAX_REQUESTS, "items": BatchLine.model_json_schema()},
    )
    completion_window: Literal["24h"] = "24h"
    metadata: dict[str, str] | None = Field(None, max_length=16, description="Returned with the batch.")


@dataclass(frozen=True)
class CheckedBatch:
    """A batch whose requests are all valid."""

    model: str
    """Model of its first request."""
    parts: list[dict[str, Any]]
    """One {custom_id, url, body} a request. Each body has its seed, so that a second attempt makes the same."""
    cost: float
    """Sum of the costs of all requests, in megapixel-steps."""
    metadata: dict[str, str] | None

    @property
    def endpoint(self) -> Endpoint:
        """The url of its first request."""
        url: Endpoint = self.parts[0]["url"]
        return url


def read_batch(body: bytes, is_lines: bool, recipe_of: RecipeOf, max_live: int) -> CheckedBatch:
    """Read a batch; if one request is invalid, the whole batch is. A large batch takes a while.

    Args:
        is_lines: whether the body has one JSON object a line, as OpenAI's batch files do, or is one JSON object.
        max_live: most pictures that the engine accepts at once.

    Raises:
        APIError: 400 naming the first bad requests by their line, or by their number in `requests`, from 1.
    """
    metadata, url = None, IMAGES
    if is_lines:
        lines: list[tuple[int, Any]] = [(n, line) for n, line in enumerate(body.split(b"\n"), 1) if line.strip()]
    else:
        batch = parse_body(body, BatchRequest)
        lines, metadata, url = list(enumerate(batch.requests, 1)), batch.metadata, batch.endpoint
    if not 1 <= len(lines) <= MAX_REQUESTS:
        raise invalid(f"the batch has {len(lines)} requests; send 1 to {MAX_REQUESTS}", "requests", "invalid_value")
    parts: list[dict[str, Any]] = []
    bad: list[str] = []
    cost, known = 0.0, set[str]()
    for number, line in lines:
        try:
            part, line_cost = _read_line(line, url, recipe_of, max_live, known)
        except (APIError, InvalidRequestError) as error:
            bad.append(f"{'line' if is_lines else 'request'} {number}: {error}")
            continue
        parts.append(part)
        cost += line_cost
    if bad:
        named = "; ".join(bad[:MAX_NAMED]) + (f"; and {len(bad) - MAX_NAMED} more" if len(bad) > MAX_NAMED else "")
        raise invalid(f"no request was accepted. {named}", "requests", "invalid_batch")
    return CheckedBatch(parts[0]["body"]["model"], parts, cost, metadata)


def _read_line(
    line: Any, url: Endpoint, recipe_of: RecipeOf, max_live: int, known: set[str]
) -> tuple[dict[str, Any], float]:
    """Return a request with its seed, and its cost."""
    read = read_batch_line(line, url)
    if read.custom_id in known:
        raise invalid(
            f"custom_id {read.custom_id!r} appears twice; give each request its own", "custom_id", "invalid_value"
        )
    known.add(read.custom_id)
    order = background_order(read.url, read.body, recipe_of)
    if (n := len(order.pictures)) > max_live:
        raise invalid(f"n is {n}; this server has at most {max_live} pictures at once", "n", "invalid_value")
    body = read.body | {"seed": order.pictures[0].seed, "model": order.model}
    return {"custom_id": read.custom_id, "url": read.url, "body": body}, order.cost


class BatchCounts(BaseModel):
    """Number of requests of a batch, by state."""

    total: int
    completed: int
    failed: int


class BatchErrorItem(BaseModel):
    """One reason why a whole batch failed."""

    code: str
    message: str
    line: None = None
    param: None = None


class BatchErrors(BaseModel):
    """Reasons why a whole batch failed."""

    object: Literal["list"] = "list"
    data: list[BatchErrorItem]


class Batch(BaseModel):
    """A batch, in the shape that OpenAI's client reads."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: Endpoint
    """The url of its first request."""
    model: str
    completion_window: Literal["24h"] = "24h"
    input_file_id: str = ""
    """Always empty: the batch contains its requests."""
    status: Literal["in_progress", "completed", "failed", "cancelled"]
    """Never `validating`, as requests are checked before the batch is accepted."""
    created_at: int
    in_progress_at: int | None
    completed_at: int | None
    failed_at: int | None
    cancelled_at: int | None
    expires_at: int
    """Time when the batch and its files are deleted, Unix seconds."""
    request_counts: BatchCounts
    output_file_id: str | None
    """File of JSON lines {id, custom_id, response, error}, at /v1/files/{id}/content."""
    error_file_id: str | None
    """File of the failed requests, in the same form."""
    errors: BatchErrors | None
    metadata: dict[str, str] | None


class BatchList(BaseModel):
    """Answer of GET /v1/batches."""

    object: Literal["list"] = "list"
    data: list[Batch]
    first_id: str | None
    last_id: str | None
    has_more: bool


def to_batch(job: Job) -> Batch:
    """Return a job in the shape of the API."""
    ended_at = None if job.completed_at is None else int(job.completed_at)
    error = job.error_code and BatchErrorItem(code=job.error_code, message=job.error_message or "")
    return Batch(
        id=job.id,
        endpoint=job.request.get("endpoint", IMAGES),  # version 0.1 stored none
        model=job.model,
        status="in_progress" if job.status == "queued" else job.status,
        created_at=int(job.created_at),
        in_progress_at=None if job.started_at is None else int(job.started_at),
        completed_at=ended_at if job.status == "completed" else None,
        failed_at=ended_at if job.status == "failed" else None,
        cancelled_at=ended_at if job.status == "cancelled" else None,
        expires_at=int(job.expires_at),
        request_counts=BatchCounts(total=job.num_parts, completed=job.num_done - job.num_failed, failed=job.num_failed),
        output_file_id=job.result.get("output_file_id"),
        error_file_id=job.result.get("error_file_id"),
        errors=BatchErrors(data=[error]) if error else None,
        metadata=job.request.get("metadata"),
    )
