"""Jobs, their parts and their limits, as values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

JobKind = Literal["video", "batch"]


JobStatus = Literal["queued", "in_progress", "completed", "failed", "cancelled"]


UNFINISHED = ("queued", "in_progress")


@dataclass(frozen=True)
class JobRequest:
    """What is to be done, and for whom."""

    kind: JobKind
    owner: str
    """Name of the caller's key."""
    model: str
    request: dict[str, Any]
    parts: Sequence[dict[str, Any]]
    """Of each part, what is its own."""
    idempotency_key: str | None = None
    body_sha256: str | None = None
    """Of what came with the key."""


@dataclass(frozen=True)
class Job:
    """A job as it stood when it was read."""

    id: str
    kind: JobKind
    owner: str
    model: str
    status: JobStatus
    num_parts: int
    num_done: int
    """Parts that are made, those that failed included."""
    num_failed: int
    request: dict[str, Any]
    result: dict[str, Any]
    """What came of it; empty before."""
    error_code: str | None
    error_message: str | None
    created_at: float
    started_at: float | None
    completed_at: float | None
    """When it ended, however it did."""
    expires_at: float
    attempt: int
    """Leases that were taken on it and not given back."""
    worker: str | None
    """Names the lease."""

    @property
    def is_finished(self) -> bool:
        return self.status not in UNFINISHED


@dataclass(frozen=True)
class Part:
    """One part of a job."""

    position: int
    request: dict[str, Any]


@dataclass(frozen=True)
class FinishedPart:
    """What came of one part."""

    position: int
    content: bytes
    is_failed: bool


@dataclass(frozen=True)
class JobLimits:
    """How much may wait."""

    per_owner: int = 16
    total: int = 256


class LeaseLostError(Exception):
    """The job is not this worker's any more: it was cancelled or deleted, or went to another."""
