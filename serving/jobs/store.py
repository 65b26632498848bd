"""The queue of jobs: rows of a database, SQLite beside one machine's servers or PostgreSQL for several machines.

A job is a number of parts, as frames or a batch's requests. What a worker finished of it is kept, so that whoever
goes on with the job makes the rest only. Laws (tests/serving/jobs/test_store.py): a job is held by one worker at a
time; what is not renewed is handed on once, then it failed; whatever a worker changes, it changes under its lease.

Times are Unix seconds by the clocks of the servers, which must agree to a fraction of a lease.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, get_args

import sqlalchemy as sql
from sqlalchemy import ColumnElement, Connection, Row

from serving.errors import APIError, invalid
from serving.jobs.job import (
    UNFINISHED,
    FinishedPart,
    Job,
    JobKind,
    JobLimits,
    JobRequest,
    JobStatus,
    LeaseLostError,
    Part,
)
from serving.jobs.tables import jobs, open_database, parts

MAX_ATTEMPTS = 2


class JobStore:
    """Blocks: never called on an event loop's thread. Thread-safe."""

    def __init__(self, url: str, lease_s: float, keep_s: float) -> None:
        """
        Args:
            url: as SQLAlchemy reads it.
            lease_s: a job that is not renewed for so long is another's.
            keep_s: what ended is deleted after it, and what did not even begin is given up.

        Raises:
            ValueError: the database cannot be used.
        """
        self.lease_s = lease_s
        self._keep_s = keep_s
        self._engine = open_database(url)

    def close(self) -> None:
        self._engine.dispose()

    # -- for callers --------------------------------------------------------------------------

    def create(self, wanted: JobRequest, limits: JobLimits, approve: Callable[[], None]) -> Job:
        """Accept a job: when this returns it is on the disk. With a key that is known, return its job.

        Args:
            approve: called when nothing else speaks against the job; what it raises does.

        Raises:
            APIError: 422, the key came with another body before; 429, too many jobs wait.
        """
        try:
            return self._create(wanted, limits, approve)
        except sql.exc.IntegrityError:  # another server was first with this key, where writers do not take turns
            return self._create(wanted, limits, approve)

    def _create(self, wanted: JobRequest, limits: JobLimits, approve: Callable[[], None]) -> Job:
        with self._writing() as connection:
            if wanted.idempotency_key is not None and (known := self._known(connection, wanted)):
                return known
            self._check_limits(connection, wanted.owner, limits)
            approve()
            now_s = time.time()
            row = {
                "id": f"{wanted.kind}_{secrets.token_hex(16)}",
                "kind": wanted.kind,
                "owner": wanted.owner,
                "model": wanted.model,
                "status": "queued",
                "num_parts": len(wanted.parts),
                "num_done": 0,
                "num_failed": 0,
                "request": json.dumps(wanted.request),
                "created_at": now_s,
                "expires_at": now_s + self._keep_s,
                "attempt": 0,
                "idempotency_key": wanted.idempotency_key,
                "body_sha256": wanted.body_sha256,
            }
            inserted = connection.execute(sql.insert(jobs).values(row).returning(jobs)).one()
            of_parts = [
                {"job_id": row["id"], "position": position, "request": json.dumps(part)}
                for position, part in enumerate(wanted.parts)
            ]
            connection.execute(sql.insert(parts), of_parts)
            return _to_job(inserted)

    def get(self, kind: JobKind, owner: str, job_id: str) -> Job:
        """
        Raises:
            APIError: 404, the caller has no such job.
        """
        with self._reading() as connection:
            row = connection.execute(sql.select(jobs).where(_owned(kind, owner, job_id))).one_or_none()
        if row is None:
            raise _not_found(kind, job_id)
        return _to_job(row)

    def page(self, kind: JobKind, owner: str, after: str | None, limit: int, newest_first: bool) -> list[Job]:
        """Return a caller's jobs in the order of their creation.

        Raises:
            APIError: 404, `after` is none of them.
        """
        place = sql.tuple_(jobs.c.created_at, jobs.c.id)
        found = sql.select(jobs).where(jobs.c.kind == kind, jobs.c.owner == owner).limit(limit)
        if after is not None:
            last = self.get(kind, owner, after)
            here = sql.tuple_(sql.literal(last.created_at, sql.Double), sql.literal(last.id))
            found = found.where(place < here if newest_first else place > here)
        keys = (jobs.c.created_at, jobs.c.id)
        found = found.order_by(*(key.desc() if newest_first else key for key in keys))
        with self._reading() as connection:
            return [_to_job(row) for row in connection.execute(found)]

    def cancel(self, kind: JobKind, owner: str, job_id: str) -> Job:
        """End a job; one that has ended stays as it is.

        Raises:
            APIError: 404, the caller has no such job.
        """
        with self._writing() as connection:
            is_his = sql.and_(_owned(kind, owner, job_id), jobs.c.status.in_(UNFINISHED))
            self._end(connection, is_his, "cancelled")
        return self.get(kind, owner, job_id)

    def delete(self, kind: JobKind, owner: str, job_id: str) -> Job:
        """Forget a job, whatever its state. Returns it as it was.

        Raises:
            APIError: 404, the caller has no such job.
        """
        with self._writing() as connection:
            row = connection.execute(sql.delete(jobs).where(_owned(kind, owner, job_id)).returning(jobs)).one_or_none()
        if row is None:
            raise _not_found(kind, job_id)
        return _to_job(row)

    # -- for workers --------------------------------------------------------------------------

    def claim(self, worker: str, models: Sequence[str]) -> Job | None:
        """Take the job that waits longest, or one whose worker was lost; None where there is none.

        Args:
            worker: who asks, for those who look at the table.
            models: what it serves.
        """
        now_s = time.time()
        is_lost = sql.and_(jobs.c.status == "in_progress", jobs.c.lease_until < now_s)
        is_free = sql.and_(jobs.c.model.in_(models), sql.or_(jobs.c.status == "queued", is_lost))
        next_id = sql.select(jobs.c.id).where(is_free).order_by(jobs.c.created_at).limit(1)
        with self._writing() as connection:
            message = f"the server that worked on it was lost, {MAX_ATTEMPTS} times; create it again"
            self._end(connection, sql.and_(is_lost, jobs.c.attempt >= MAX_ATTEMPTS), "failed", "worker_lost", message)
            row = connection.execute(
                sql.update(jobs)
                .where(jobs.c.id == next_id.with_for_update(skip_locked=True).scalar_subquery(), is_free)
                .values(
                    status="in_progress",
                    worker=f"{worker[:40]}/{secrets.token_hex(8)}",  # of this lease alone
                    attempt=jobs.c.attempt + 1,
                    lease_until=now_s + self.lease_s,
                    started_at=sql.func.coalesce(jobs.c.started_at, now_s),
                )
                .returning(jobs)
            ).one_or_none()
        return None if row is None else _to_job(row)

    def renew(self, job: Job) -> None:
        """Hold a job for another `lease_s`.

        Raises:
            LeaseLostError: it is not this worker's any more.
        """
        with self._writing() as connection:
            self._change(connection, job, {"lease_until": time.time() + self.lease_s})

    def release(self, job: Job) -> None:
        """Give a job back for another to go on with it; this does not count as an attempt."""
        with self._writing() as connection:
            given_back = {"status": "queued", "worker": None, "lease_until": None, "attempt": jobs.c.attempt - 1}
            connection.execute(sql.update(jobs).where(_held(job)).values(given_back))

    def unfinished_parts(self, job: Job) -> list[Part]:
        """Return what is still to be made."""
        wanted = sql.select(parts.c.position, parts.c.request).where(
            parts.c.job_id == job.id, parts.c.content.is_(None)
        )
        with self._reading() as connection:
            rows = connection.execute(wanted.order_by(parts.c.position)).all()
        return [Part(position, json.loads(request)) for position, request in rows]

    def finished_parts(self, job: Job) -> Iterator[FinishedPart]:
        """Yield what was made, in order, not all of it in memory."""
        for position in range(job.num_parts):
            wanted = sql.select(parts.c.content, parts.c.is_failed).where(
                parts.c.job_id == job.id, parts.c.position == position, parts.c.content.is_not(None)
            )
            with self._reading() as connection:
                row = connection.execute(wanted).one_or_none()
            if row is None:
                raise LeaseLostError(job.id)  # parts go only with their job
            yield FinishedPart(position, row.content, row.is_failed)

    def save(self, job: Job, part: FinishedPart) -> None:
        """Keep what was made of one part, and renew the lease.

        Raises:
            LeaseLostError: the job is not this worker's any more.
        """
        with self._writing() as connection:
            changes = {
                "lease_until": time.time() + self.lease_s,
                "num_done": jobs.c.num_done + 1,
                "num_failed": jobs.c.num_failed + int(part.is_failed),
            }
            self._change(connection, job, changes)
            place = sql.and_(parts.c.job_id == job.id, parts.c.position == part.position, parts.c.content.is_(None))
            kept = sql.update(parts).where(place).values(content=part.content, is_failed=part.is_failed)
            if connection.execute(kept).rowcount != 1:
                raise LeaseLostError(job.id)

    def complete(self, job: Job, result: dict[str, Any]) -> None:
        """End a job well.

        Raises:
            LeaseLostError: the job is not this worker's any more.
        """
        self._finish(job, "completed", result=json.dumps(result))

    def fail(self, job: Job, code: str, message: str) -> None:
        """End a job badly.

        Raises:
            LeaseLostError: the job is not this worker's any more.
        """
        self._finish(job, "failed", error_code=code, error_message=message)

    def expire(self) -> None:
        """Delete what ended long ago; give up what waited too long for somebody who serves its model."""
        now_s = time.time()
        is_old = jobs.c.expires_at < now_s
        with self._writing() as connection:
            connection.execute(sql.delete(jobs).where(is_old, jobs.c.status.not_in(UNFINISHED)))
            is_left = sql.or_(jobs.c.status == "queued", jobs.c.lease_until < now_s)
            message = "nobody worked on it in time; create it again"
            self._end(
                connection, sql.and_(is_old, jobs.c.status.in_(UNFINISHED), is_left), "failed", "expired", message
            )

    # -- inside -------------------------------------------------------------------------------

    def _writing(self) -> AbstractContextManager[Connection]:
        return self._engine.begin()

    def _reading(self) -> AbstractContextManager[Connection]:
        return self._engine.execution_options(is_reading=True).begin()

    def _known(self, connection: Connection, wanted: JobRequest) -> Job | None:
        same = (
            jobs.c.owner == wanted.owner,
            jobs.c.kind == wanted.kind,
            jobs.c.idempotency_key == wanted.idempotency_key,
        )
        row = connection.execute(sql.select(jobs).where(*same)).one_or_none()
        if row is not None and row.body_sha256 != wanted.body_sha256:
            key = str(wanted.idempotency_key)[:64]
            message = f"Idempotency-Key {key!r} was used with another body; a new request needs a new key"
            raise invalid(message, "Idempotency-Key", "idempotency_key_reused", 422)
        return None if row is None else _to_job(row)

    @staticmethod
    def _check_limits(connection: Connection, owner: str, limits: JobLimits) -> None:
        is_his = jobs.c.owner == owner
        counted = sql.select(sql.func.count(), sql.func.count(sql.case((is_his, 1)))).select_from(jobs)
        total, his = connection.execute(counted.where(jobs.c.status.in_(UNFINISHED))).one()
        if his >= limits.per_owner:
            what = f"{his} of your jobs are unfinished, which is the most"
        elif total >= limits.total:
            what = f"{total} jobs are unfinished on this server, which is the most"
        else:
            return
        headers = {"retry-after": "10"}
        message = f"{what}; retry when one has ended, or cancel one"
        raise APIError(429, message, "rate_limit_error", code="too_many_jobs", headers=headers)

    def _change(self, connection: Connection, job: Job, changes: dict[str, Any]) -> None:
        if connection.execute(sql.update(jobs).where(_held(job)).values(changes)).rowcount != 1:
            raise LeaseLostError(job.id)

    def _finish(self, job: Job, status: JobStatus, **values: str) -> None:
        with self._writing() as connection:
            if not self._end(connection, _held(job), status, **values):
                raise LeaseLostError(job.id)

    def _end(
        self,
        connection: Connection,
        which: ColumnElement[bool],
        status: JobStatus,
        error_code: str | None = None,
        error_message: str | None = None,
        result: str | None = None,
    ) -> int:
        """Let jobs end; their parts are of no more use. Returns how many did."""
        now_s = time.time()
        ended = connection.execute(
            sql.update(jobs)
            .where(which)
            .values(
                status=status,
                error_code=error_code,
                error_message=error_message,
                result=result,
                completed_at=now_s,
                expires_at=now_s + self._keep_s,
                lease_until=None,
                worker=None,
            )
            .returning(jobs.c.id)
        ).scalars()
        ids = ended.all()
        if ids:
            connection.execute(sql.delete(parts).where(parts.c.job_id.in_(ids)))
        return len(ids)


def _owned(kind: JobKind, owner: str, job_id: str) -> ColumnElement[bool]:
    return sql.and_(jobs.c.id == job_id[:64], jobs.c.kind == kind, jobs.c.owner == owner)


def _held(job: Job) -> ColumnElement[bool]:
    """Whether it is still under the lease that it was claimed by."""
    return sql.and_(jobs.c.id == job.id, jobs.c.status == "in_progress", jobs.c.worker == job.worker)


def _to_job(row: Row[Any]) -> Job:
    values = {name: row._mapping[name] for name in Job.__dataclass_fields__}
    assert values["kind"] in get_args(JobKind) and values["status"] in get_args(JobStatus)
    values |= {"request": json.loads(values["request"]), "result": json.loads(values["result"] or "{}")}
    return Job(**values)


def _not_found(kind: JobKind, job_id: str) -> APIError:
    return invalid(f"{kind} {job_id[:64]!r} does not exist, or not any more", f"{kind}_id", "not_found", 404)
