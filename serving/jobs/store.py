"""Queue of jobs in a database: SQLite for the servers of one machine, PostgreSQL for several machines.

A job consists of parts: the frames of a clip or the requests of a batch. Finished parts are kept, so that the next
worker makes only the rest. Laws (tests/serving/jobs/test_store.py): one worker at a time holds a job; a job whose lease
is not renewed goes to another worker once, and the next time it fails; a worker changes a job only under its lease.

Times are in Unix seconds by the clocks of the servers, which must agree to a fraction of a lease.
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

from serving.errors import APIError, invalid, reused_key
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
    """Queue of jobs. It is thread-safe, and its methods block: do not call them in an event loop."""

    def __init__(self, url: str, lease_s: float, keep_s: float) -> None:
        """
        Args:
            url: SQLAlchemy URL of the database.
            lease_s: time without renewal after which another worker may claim a job, in seconds.
            keep_s: time after which ended jobs are deleted and waiting jobs fail, in seconds.

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
        """Accept a job. When this returns, the job is on the disk. A known idempotency key returns its job.

        Args:
            approve: called when the job has passed all other checks. If it raises, the job is not accepted.

        Raises:
            APIError: 422, the key came with another body before; 429, too many jobs are unfinished.
        """
        try:
            return self._create(wanted, limits, approve)
        except sql.exc.IntegrityError:  # in PostgreSQL another server can store the same key in between
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
        """Return a caller's job.

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
            APIError: 404, `after` is not one of them.
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
        """Cancel a job. A job that has ended stays as it is.

        Raises:
            APIError: 404, the caller has no such job.
        """
        with self._writing() as connection:
            is_open = sql.and_(_owned(kind, owner, job_id), jobs.c.status.in_(UNFINISHED))
            self._end(connection, is_open, "cancelled")
        return self.get(kind, owner, job_id)

    def delete(self, kind: JobKind, owner: str, job_id: str) -> Job:
        """Delete a job in any state. Returns the job as it was.

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
        """Claim the oldest job that is queued or whose worker was lost. Returns None if there is none.

        Args:
            worker: name of the worker, for people who read the table.
            models: names of the models that the worker serves.
        """
        now_s = time.time()
        is_lost = sql.and_(jobs.c.status == "in_progress", jobs.c.lease_until < now_s)
        is_free = sql.and_(jobs.c.model.in_(models), sql.or_(jobs.c.status == "queued", is_lost))
        next_id = sql.select(jobs.c.id).where(is_free).order_by(jobs.c.created_at).limit(1)
        with self._writing() as connection:
            message = f"the server was lost {MAX_ATTEMPTS} times while it worked on the job; create the job again"
            self._end(connection, sql.and_(is_lost, jobs.c.attempt >= MAX_ATTEMPTS), "failed", "worker_lost", message)
            row = connection.execute(
                sql.update(jobs)
                .where(jobs.c.id == next_id.with_for_update(skip_locked=True).scalar_subquery(), is_free)
                .values(
                    status="in_progress",
                    worker=f"{worker[:40]}/{secrets.token_hex(8)}",  # unique to this lease
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
            LeaseLostError: the worker has lost the job.
        """
        with self._writing() as connection:
            self._change(connection, job, {"lease_until": time.time() + self.lease_s})

    def release(self, job: Job) -> None:
        """Give a job back, so that another worker can continue it. The attempt is not counted."""
        with self._writing() as connection:
            given_back = {"status": "queued", "worker": None, "lease_until": None, "attempt": jobs.c.attempt - 1}
            connection.execute(sql.update(jobs).where(_held(job)).values(given_back))

    def unfinished_parts(self, job: Job) -> list[Part]:
        """Return the parts that are not made yet."""
        wanted = sql.select(parts.c.position, parts.c.request).where(
            parts.c.job_id == job.id, parts.c.content.is_(None)
        )
        with self._reading() as connection:
            rows = connection.execute(wanted.order_by(parts.c.position)).all()
        return [Part(position, json.loads(request)) for position, request in rows]

    def finished_parts(self, job: Job) -> Iterator[FinishedPart]:
        """Yield the finished parts in order, with one in memory at a time."""
        for position in range(job.num_parts):
            wanted = sql.select(parts.c.content, parts.c.is_failed).where(
                parts.c.job_id == job.id, parts.c.position == position, parts.c.content.is_not(None)
            )
            with self._reading() as connection:
                row = connection.execute(wanted).one_or_none()
            if row is None:
                raise LeaseLostError(job.id)  # parts are deleted only when their job ends
            yield FinishedPart(position, row.content, row.is_failed)

    def save(self, job: Job, part: FinishedPart) -> None:
        """Keep a finished part and renew the lease.

        Raises:
            LeaseLostError: the worker has lost the job.
        """
        with self._writing() as connection:
            changes = {
                "lease_until": time.time() + self.lease_s,
                "num_done": jobs.c.num_done + 1,
                "num_failed": jobs.c.num_failed + int(part.is_failed),
                "result": None,
            }
            self._change(connection, job, changes)
            place = sql.and_(parts.c.job_id == job.id, parts.c.position == part.position, parts.c.content.is_(None))
            kept = sql.update(parts).where(place).values(content=part.content, is_failed=part.is_failed)
            if connection.execute(kept).rowcount != 1:
                raise LeaseLostError(job.id)

    def report(self, job: Job, progress: float) -> None:
        """Keep how far the current part is, 0 to 1, and renew the lease.

        Raises:
            LeaseLostError: the worker has lost the job.
        """
        known = {"lease_until": time.time() + self.lease_s, "result": json.dumps({"progress": progress})}
        with self._writing() as connection:
            self._change(connection, job, known)

    def complete(self, job: Job, result: dict[str, Any]) -> None:
        """End a job with its result.

        Raises:
            LeaseLostError: the worker has lost the job.
        """
        self._finish(job, "completed", result=json.dumps(result))

    def fail(self, job: Job, code: str, message: str) -> None:
        """End a job with an error.

        Raises:
            LeaseLostError: the worker has lost the job.
        """
        self._finish(job, "failed", error_code=code, error_message=message)

    def expire(self) -> None:
        """Delete jobs that ended `keep_s` ago. Fail jobs that no worker holds `keep_s` after they were accepted."""
        now_s = time.time()
        is_old = jobs.c.expires_at < now_s
        with self._writing() as connection:
            connection.execute(sql.delete(jobs).where(is_old, jobs.c.status.not_in(UNFINISHED)))
            is_left = sql.or_(jobs.c.status == "queued", jobs.c.lease_until < now_s)
            message = f"no server finished the job within {self._keep_s / 3600:g} hours; create the job again"
            self._end(
                connection, sql.and_(is_old, jobs.c.status.in_(UNFINISHED), is_left), "failed", "expired", message
            )

    # -- internals ----------------------------------------------------------------------------

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
            raise reused_key(str(wanted.idempotency_key))
        return None if row is None else _to_job(row)

    @staticmethod
    def _check_limits(connection: Connection, owner: str, limits: JobLimits) -> None:
        is_owned = jobs.c.owner == owner
        counted = sql.select(sql.func.count(), sql.func.count(sql.case((is_owned, 1)))).select_from(jobs)
        total, owned = connection.execute(counted.where(jobs.c.status.in_(UNFINISHED))).one()
        if owned >= limits.per_owner:
            what = f"{owned} of your jobs are unfinished, which is the most"
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
        """End jobs and delete their parts. Returns the number of jobs."""
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
    """Return the condition that the job is still under the lease with which it was claimed."""
    return sql.and_(jobs.c.id == job.id, jobs.c.status == "in_progress", jobs.c.worker == job.worker)


def _to_job(row: Row[Any]) -> Job:
    values = {name: row._mapping[name] for name in Job.__dataclass_fields__}
    assert values["kind"] in get_args(JobKind) and values["status"] in get_args(JobStatus)
    values |= {"request": json.loads(values["request"]), "result": json.loads(values["result"] or "{}")}
    return Job(**values)


def _not_found(kind: JobKind, job_id: str) -> APIError:
    return invalid(f"{kind} {job_id[:64]!r} does not exist or was deleted", f"{kind}_id", "not_found", 404)
