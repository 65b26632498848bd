"""Laws of the queue: one worker holds a job, a lost worker is replaced once, and no job is lost or kept for ever."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from serving.errors import APIError
from serving.jobs import store as jobs_store
from serving.jobs.job import FinishedPart, Job, JobLimits, JobRequest, LeaseLostError
from serving.jobs.store import MAX_ATTEMPTS, JobStore

LEASE_S = 10.0
KEEP_S = 1000.0
LIMITS = JobLimits(per_owner=8, total=12)
PARTS = [{"n": n} for n in range(3)]


class Clock:
    """Clock of the store, which tests move."""

    def __init__(self) -> None:
        self.now_s = 1e6

    def time(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(jobs_store, "time", clock)
    return clock


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    opened = JobStore(f"sqlite:///{tmp_path / 'jobs.db'}", LEASE_S, KEEP_S)
    yield opened
    opened.close()


def nothing() -> None:
    pass


def wanted(owner: str = "ann", key: str | None = None, body: str = "a") -> JobRequest:
    return JobRequest("video", owner, "m", {"prompt": "a"}, PARTS, key, body if key else None)


def create(store: JobStore, owner: str = "ann", key: str | None = None, body: str = "a") -> Job:
    return store.create(wanted(owner, key, body), LIMITS, nothing)


def make_all(store: JobStore, job: Job) -> None:
    for part in store.unfinished_parts(job):
        store.save(job, FinishedPart(part.position, b"made", is_failed=part.position == 1))


def claimed(store: JobStore, worker: str = "w") -> Job:
    job = store.claim(worker, ["m"])
    assert job is not None
    return job


# -- workers ---------------------------------------------------------------------------------------


def test_a_job_goes_from_queued_to_completed(store: JobStore, clock: Clock) -> None:
    created = create(store)
    assert (created.status, created.attempt, created.num_parts) == ("queued", 0, 3)
    job = claimed(store)
    assert (job.id, job.status, job.attempt) == (created.id, "in_progress", 1)
    make_all(store, job)
    parts = list(store.finished_parts(job))
    assert [part.position for part in parts] == [0, 1, 2] and parts[1].is_failed
    store.complete(job, {"file": "x"})
    ended = store.get("video", "ann", job.id)
    assert (ended.status, ended.num_done, ended.num_failed, ended.result) == ("completed", 3, 1, {"file": "x"})
    assert store.claim("w", ["m"]) is None
    assert not store.unfinished_parts(job), "parts are deleted when their job ends"


def test_the_next_worker_makes_only_the_missing_parts(store: JobStore, clock: Clock) -> None:
    create(store)
    first = claimed(store)
    store.save(first, FinishedPart(1, b"made", is_failed=False))
    clock.now_s += LEASE_S + 1
    second = claimed(store)
    assert second.attempt == 2
    assert [part.position for part in store.unfinished_parts(second)] == [0, 2]
    for change in (
        lambda: store.save(first, FinishedPart(0, b"late", is_failed=False)),
        lambda: store.renew(first),
        lambda: store.complete(first, {}),
        lambda: store.fail(first, "a", "b"),
    ):
        with pytest.raises(LeaseLostError):
            change()
    make_all(store, second)
    assert [part.content for part in store.finished_parts(second)] == [b"made"] * 3


def test_a_lost_worker_is_replaced_once(store: JobStore, clock: Clock) -> None:
    create(store)
    for _ in range(MAX_ATTEMPTS):
        job = claimed(store)
        assert store.claim("another", ["m"]) is None
        clock.now_s += LEASE_S + 1
    assert store.claim("w", ["m"]) is None
    ended = store.get("video", "ann", job.id)
    assert (ended.status, ended.error_code) == ("failed", "worker_lost")


def test_renewing_and_giving_back_count_as_no_attempt(store: JobStore, clock: Clock) -> None:
    create(store)
    job = claimed(store)
    for _ in range(5):
        clock.now_s += 0.9 * LEASE_S
        assert store.claim("another", ["m"]) is None
        store.renew(job)
    for _ in range(5):
        store.release(job)
        assert store.get("video", "ann", job.id).attempt == 0
        job = claimed(store)
        assert job.attempt == 1


def test_a_lease_that_was_given_back_has_ended_even_for_the_same_worker(store: JobStore) -> None:
    create(store)
    before = claimed(store)
    store.release(before)
    claimed(store)
    with pytest.raises(LeaseLostError):
        store.renew(before)


@pytest.mark.parametrize("end", ["cancel", "delete"])
def test_a_worker_loses_a_job_that_its_owner_cancels_or_deletes(store: JobStore, end: str) -> None:
    create(store)
    job = claimed(store)
    getattr(store, end)("video", "ann", job.id)
    with pytest.raises(LeaseLostError):
        store.save(job, FinishedPart(0, b"made", is_failed=False))
    assert store.claim("w", ["m"]) is None


def test_a_worker_claims_only_jobs_of_its_models(store: JobStore) -> None:
    create(store)
    assert store.claim("w", ["another"]) is None


def test_workers_that_claim_at_once_get_different_jobs(store: JobStore) -> None:
    ids = {create(store).id for _ in range(6)}
    with ThreadPoolExecutor(8) as pool:
        found = [job for job in pool.map(lambda n: store.claim(f"w{n}", ["m"]), range(12)) if job is not None]
    assert sorted(job.id for job in found) == sorted(ids)


# -- callers ---------------------------------------------------------------------------------------


def test_only_the_owner_sees_a_job(store: JobStore) -> None:
    job = create(store, "ann")
    for look in (store.get, store.cancel, store.delete):
        with pytest.raises(APIError) as caught:
            look("video", "bob", job.id)
        assert caught.value.status == 404
    assert store.page("video", "bob", None, 10, True) == []


def test_a_repeated_idempotency_key_gives_the_same_job_and_costs_nothing(store: JobStore) -> None:
    spent: list[int] = []

    def ask(key: str, body: str, owner: str = "ann") -> Job:
        return store.create(wanted(owner, key, body), LIMITS, lambda: spent.append(1))

    first = ask("k", "a")
    assert ask("k", "a").id == first.id and len(spent) == 1
    assert ask("k", "a", "bob").id != first.id
    with pytest.raises(APIError) as caught:
        ask("k", "b")
    assert (caught.value.status, caught.value.code) == (422, "idempotency_key_reused")


def test_a_refused_job_is_not_stored(store: JobStore) -> None:
    def refuse() -> None:
        raise APIError(429, "no")

    with pytest.raises(APIError):
        store.create(wanted(key="k"), LIMITS, refuse)
    assert store.page("video", "ann", None, 10, True) == []


def test_the_number_of_unfinished_jobs_is_limited(store: JobStore) -> None:
    for _ in range(LIMITS.per_owner):
        create(store, "ann")
    for _ in range(LIMITS.total - LIMITS.per_owner):
        create(store, "bob")
    for owner, says in (("ann", "8 of your jobs"), ("eve", "12 jobs are unfinished on this server")):
        with pytest.raises(APIError, match=says) as caught:
            create(store, owner)
        assert (caught.value.status, caught.value.code) == (429, "too_many_jobs")
    store.complete(claimed(store), {})
    create(store, "ann")


@pytest.mark.parametrize("newest_first", [True, False], ids=["newest first", "oldest first"])
def test_pages_list_every_job_once(store: JobStore, clock: Clock, newest_first: bool) -> None:
    """All jobs have the same time of creation."""
    ids = [create(store).id for _ in range(7)]
    seen: list[str] = []
    while page := store.page("video", "ann", seen[-1] if seen else None, 3, newest_first):
        seen += [job.id for job in page]
    assert sorted(seen) == sorted(ids)
    assert len(seen) == len(set(seen))


def test_old_ended_jobs_are_deleted_and_old_waiting_jobs_fail(store: JobStore, clock: Clock) -> None:
    done, waiting, running = (create(store) for _ in range(3))
    make_all(store, job := claimed(store))
    store.complete(job, {})
    held = claimed(store)
    assert (job.id, held.id) != (running.id, running.id)
    clock.now_s += KEEP_S + 1
    store.renew(held)
    store.expire()
    kept = {found.id: found for found in store.page("video", "ann", None, 10, True)}
    assert job.id not in kept and job.id in {done.id, waiting.id, running.id}
    assert kept[held.id].status == "in_progress", "a worker holds it"
    (left,) = (found for found in kept.values() if found.id != held.id)
    assert (left.status, left.error_code) == ("failed", "expired")
    clock.now_s += KEEP_S + 1
    store.expire()
    assert left.id not in {found.id for found in store.page("video", "ann", None, 10, True)}


# -- crashes ---------------------------------------------------------------------------------------


def test_an_accepted_job_survives_a_killed_process(tmp_path: Path) -> None:
    """The process dies right after `create` has returned, and closes nothing."""
    url = f"sqlite:///{tmp_path / 'jobs.db'}"
    script = f"""
import os, signal
from serving.jobs.store import JobLimits, JobRequest, JobStore
store = JobStore({url!r}, 10, 1000)
print(store.create(JobRequest("video", "ann", "m", {{}}, [{{}}]), JobLimits(), lambda: None).id, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert ended.returncode == -9, ended.stderr
    store = JobStore(url, LEASE_S, KEEP_S)
    assert claimed(store).id == ended.stdout.strip()
    store.close()


def test_sqlite_writes_commits_to_the_disk(store: JobStore, tmp_path: Path) -> None:
    create(store)
    with sqlite3.connect(tmp_path / "jobs.db") as other:
        assert other.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    with store._engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2, "FULL"


# -- any order of events ---------------------------------------------------------------------------


class Queue(RuleBasedStateMachine):
    """Workers that work, hang, continue too late or give up, and an owner that cancels, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.store = JobStore(f"sqlite:///{self.folder.name}/jobs.db", LEASE_S, KEEP_S)
        self.clock = Clock()
        self.real = jobs_store.time
        jobs_store.time = self.clock  # type: ignore[assignment]
        self.leases: list[Job] = []
        """All leases that were ever taken, the oldest first."""
        self.takings: dict[str, int] = {}
        """Number of leases of each job, without those given back."""
        self.held_until_s: dict[str, float] = {}
        self.ids: list[str] = []
        self.ended: dict[str, str] = {}

    def teardown(self) -> None:
        jobs_store.time = self.real
        self.store.close()
        self.folder.cleanup()

    @precondition(lambda self: len(self.ids) < LIMITS.per_owner)
    @rule()
    def accept(self) -> None:
        self.ids.append(create(self.store).id)

    @rule()
    def take(self) -> None:
        if job := self.store.claim("w", ["m"]):
            assert job.id not in self.ended
            assert self.held_until_s.get(job.id, 0.0) < self.clock.now_s
            self.held_until_s[job.id] = self.clock.now_s + LEASE_S
            self.takings[job.id] = self.takings.get(job.id, 0) + 1
            assert self.takings[job.id] == job.attempt <= MAX_ATTEMPTS
            self.leases.append(job)

    @rule(seconds=st.sampled_from([1.0, LEASE_S / 2, LEASE_S + 1]))
    def wait(self, seconds: float) -> None:
        self.clock.now_s += seconds

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), what=st.sampled_from(["renew", "save", "complete", "fail", "release"]))
    def act(self, data: st.DataObject, what: str) -> None:
        job = data.draw(st.sampled_from(self.leases))
        now = self.store.get("video", "ann", job.id)
        is_held = now.worker == job.worker and now.status == "in_progress"
        acts: dict[str, Callable[[], None]] = {
            "renew": lambda: self.store.renew(job),
            "save": lambda: make_all(self.store, job),
            "complete": lambda: self.store.complete(job, {}),
            "fail": lambda: self.store.fail(job, "a", "b"),
            "release": lambda: self.store.release(job),
        }
        try:
            acts[what]()
        except LeaseLostError:
            assert not is_held
        after = self.store.get("video", "ann", job.id)
        if not is_held:
            assert after == now, "a lost lease changes nothing"
        elif what == "renew" or (what == "save" and after != now):
            self.held_until_s[job.id] = self.clock.now_s + LEASE_S
        elif what == "release":
            self.takings[job.id] -= 1
            del self.held_until_s[job.id]
            assert after.status == "queued"
        elif what in ("complete", "fail"):
            assert after.is_finished

    @precondition(lambda self: self.ids)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.store.cancel("video", "ann", data.draw(st.sampled_from(self.ids)))

    @invariant()
    def no_job_is_lost_and_ended_jobs_do_not_change(self) -> None:
        found = {job.id: job for job in self.store.page("video", "ann", None, 100, True)}
        assert found.keys() == set(self.ids)
        for job in found.values():
            assert self.ended.get(job.id, job.status) == job.status
            if job.is_finished:
                self.ended[job.id] = job.status


Queue.TestCase.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
TestAnyOrderOfEvents = Queue.TestCase
