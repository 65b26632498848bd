"""Jobs, their parts and their limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

JobKind = Literal["video", "batch"]


JobStatus = Literal["queued", "in_progress", "completed", "failed", "cancelled"]


UNFINISHED = ("queued", "in_progress")


@dataclass(frozen=True)
class JobRequest:
    """A job that a caller asks for."""

    kind: JobKind
    owner: str
    """Name of the caller's key."""
    model: str
    request: dict[str, Any]
    parts: Sequence[dict[str, Any]]
    """Fields that differ between the parts, one dict per part."""
    idempotency_key: str | None = None
    body_sha256: str | None = None
    """SHA-256 of the body that came with the key."""


@dataclass(frozen=True)
class Job:
    """State of a job when it was read. Times are in Unix seconds."""

    id: str
    kind: JobKind
    owner: str
    model: str
    status: JobStatus
    num_parts: int
    num_done: int
    """Number of finished parts, including failed ones."""
    num_failed: int
    request: dict[str, Any]
    result: dict[str, Any]
    """Result of a completed job. Of one in the making, how far its current part is: `progress`, 0 to 1; or empty."""
    error_code: str | None
    error_message: str | None
    created_at: float
    started_at: float | None
    completed_at: float | None
    """Time at which it completed, failed or was cancelled."""
    expires_at: float
    attempt: int
    """Number of leases taken on it, without those given back."""
    worker: str | None
    """Name of the lease under which a worker holds it."""

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
    """Result of one part."""

    position: int
    content: bytes
    is_failed: bool


@dataclass(frozen=True)
class JobLimits:
    """Most unfinished jobs."""

    per_owner: int = 16
    total: int = 256


class LeaseLostError(Exception):
    """The worker has lost the job: it was cancelled or deleted, or another worker claimed it."""
