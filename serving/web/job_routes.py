"""Functions that the routes of clips and batches share."""

from __future__ import annotations

import hashlib
from dataclasses import replace

from fastapi import Request

from serving.errors import invalid
from serving.fronts.idempotency import check_key
from serving.fronts.services import Services
from serving.jobs.job import Job, JobRequest
from serving.schema.models import ModelCard
from serving.web.http_edge import caller_of

MAX_PAGE = 100
"""Most jobs in one answer."""


def check_decoder(decoder: str, card: ModelCard) -> None:
    """Check that a model has a decoder.

    Raises:
        APIError: 400, the model does not have it.
    """
    if decoder not in card.decoders:
        message = f"decoder is {decoder!r}; {card.id} has {', '.join(card.decoders)}"
        raise invalid(message, "decoder", "invalid_value")


async def create_job(request: Request, services: Services, wanted: JobRequest, cost: float, body: bytes) -> Job:
    """Accept a job within the caller's quota. A repeated `Idempotency-Key` returns the job that it created before.

    Args:
        cost: cost of the job, in megapixel-steps.
        body: request body; requests with the same key must have the same one.

    Raises:
        APIError: 400 or 422, the key cannot be used; 429, the quota is used up or too many jobs are waiting.
    """
    key = request.headers.get("idempotency-key")
    if key is not None:
        check_key(key)
        wanted = replace(wanted, idempotency_key=key, body_sha256=hashlib.sha256(body).hexdigest())
    return await services.jobs.create(wanted, lambda: caller_of(request).spend(cost))
