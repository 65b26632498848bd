"""Accepted requests are answered when a server stops, and accepted jobs finish after a process is killed."""

from __future__ import annotations

import io
import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving.command.keys import main as tdm_keys
from tdm_runtime.checkpoint.folder import DEFAULT_CHECKPOINT
from tests.serving.conftest import RunningServer, start_server
from tests.serving.killing import check_recovery, kill, make_picture, processes
from tests.serving.web.test_server import metric
from tests.serving.web.test_videos import CLIP, frames_of, wait_for_clip

PICTURES = ("--checkpoint", str(DEFAULT_CHECKPOINT))
"""Arguments of servers of the embedded checkpoint of pictures alone."""
LONG_CLIP = CLIP | {"seconds": 6, "fps": 12, "num_inference_steps": 4}
NUM_FRAMES = 72
NUM_REQUESTS, PICTURES_EACH = 6, 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nothing-is-lost")


@pytest.fixture(scope="module")
def keys(folder: Path) -> dict[str, str]:
    """Keys of ann and bob."""
    found = dict[str, str]()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("ann", "bob"):
            patch.setattr("sys.stdout", printed := io.StringIO())
            assert tdm_keys(["add", str(folder / "keys.json"), name]) == 0
            (found[name],) = (word for word in printed.getvalue().split() if word.startswith("tdm-"))
            patch.undo()
    return found


@pytest.fixture(scope="module")
def own_server(artifacts: Path, folder: Path, keys: dict[str, str]) -> Iterator[RunningServer]:
    """Server with keys, which the last test stops."""
    assert artifacts.is_dir(), "without artifacts, the server would build them and start too late"
    server = start_with_keys(folder, "log")
    yield server
    if server.process.poll() is None:
        server.stop()


def start_with_keys(folder: Path, log: str) -> RunningServer:
    """Start a server with keys. Small batches make its warm-up short, which every new replica repeats."""
    return start_server(folder / log, *PICTURES, "--api-keys", str(folder / "keys.json"), "--max-batch-size", "4")


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def as_caller(server: RunningServer, key: str) -> httpx.Client:
    return httpx.Client(base_url=server.url, timeout=60, headers=bearer(key))


def row(folder: Path, video_id: str) -> tuple[str, int, int]:
    """Return status, attempt and number of finished frames from the database."""
    with closing(sqlite3.connect(folder / "state" / "jobs.db")) as database:
        found: tuple[str, int, int] = database.execute(
            "SELECT status, attempt, num_done FROM jobs WHERE id = ?", (video_id,)
        ).fetchone()
    return found


def begin_clip(server: RunningServer, keys: dict[str, str]) -> dict[str, Any]:
    """Create a clip and wait until its making has begun. Checks that only the owner sees it."""
    ann, bob = (as_caller(server, keys[name]) for name in ("ann", "bob"))
    video = wait_for_clip(ann, ann.post("/v1/videos", json=LONG_CLIP).json()["id"], progress=10)
    assert video["status"] == "in_progress", "the clip was finished too early"
    for path in (f"/v1/videos/{video['id']}", f"/v1/videos/{video['id']}/content"):
        assert bob.get(path).status_code == 404 and httpx.get(server.url + path).status_code == 401
    assert bob.delete(f"/v1/videos/{video['id']}").status_code == 404
    assert bob.get("/v1/videos").json()["data"] == []
    return video


def check_clip(server: RunningServer, keys: dict[str, str], folder: Path, before: dict[str, Any]) -> None:
    """Check that a second attempt finishes the clip and keeps the frames of the first."""
    ann = as_caller(server, keys["ann"])
    assert wait_for_clip(ann, before["id"], progress=1)["progress"] >= before["progress"], "finished frames are kept"
    assert wait_for_clip(ann, before["id"])["status"] == "completed"
    assert row(folder, before["id"])[1] == 2, "attempts"
    assert len(frames_of(ann.get(f"/v1/videos/{before['id']}/content").content)) == NUM_FRAMES


@contextmanager
def pictures_in_flight(server: RunningServer, headers: dict[str, str]) -> Iterator[list[Future[int]]]:
    """Yield the future statuses of large requests. All are accepted by then, and not all are answered."""
    body = {"prompt": "a cat", "n": PICTURES_EACH, "num_inference_steps": 4}
    with (
        ThreadPoolExecutor(NUM_REQUESTS) as pool,
        httpx.Client(base_url=server.url, headers=headers, timeout=60) as http,
    ):

        def ask(_: int) -> int:
            return http.post("/v1/images/generations", json=body).status_code

        wanted = metric(http, "tdm_pictures_total") + NUM_REQUESTS * PICTURES_EACH
        asked = [pool.submit(ask, n) for n in range(NUM_REQUESTS)]
        while metric(http, "tdm_pictures_total") + metric(http, "tdm_live_samples") < wanted:
            assert not all(future.done() for future in asked), "the requests ended too early"
            time.sleep(0.01)
        yield asked


def test_two_servers_run_side_by_side(server: RunningServer, own_server: RunningServer, keys: dict[str, str]) -> None:
    assert make_picture(server, {}) == make_picture(own_server, bearer(keys["bob"])) == 200
    for one, other in ((server, own_server), (own_server, server)):
        assert one.port not in {c.laddr.port for p in processes(other) for c in p.net_connections("tcp")}


@pytest.mark.parametrize("time_", ["first", pytest.param("second", marks=pytest.mark.slow)])
def test_a_killed_replica_is_replaced_and_its_clip_survives(
    own_server: RunningServer, folder: Path, keys: dict[str, str], time_: str
) -> None:
    """The second time shows that the first recovery used nothing up."""
    begun = list[dict[str, Any]]()
    check_recovery(
        own_server, "ray::ServeReplica", bearer(keys["bob"]), lambda: begun.append(begin_clip(own_server, keys))
    )
    (video,) = begun
    check_clip(own_server, keys, folder, video)


def test_a_stopping_server_answers_accepted_requests_and_gives_its_jobs_back(
    own_server: RunningServer, folder: Path, keys: dict[str, str]
) -> None:
    video = begin_clip(own_server, keys)
    with pictures_in_flight(own_server, bearer(keys["bob"])) as asked:
        assert own_server.stop() == 0, own_server.log.read_text()[-2000:]
        assert [future.result() for future in asked] == [200] * NUM_REQUESTS
    status, attempt, num_done = row(folder, video["id"])
    assert (status, attempt) == ("queued", 0) and num_done > 0, "a regular stop counts as no attempt"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_proxy_of_ray_is_replaced_and_a_stop_answers_accepted_requests(tmp_path: Path) -> None:
    server = start_server(tmp_path / "log", *PICTURES, "--front", "ray")
    answer = httpx.get(f"{server.url}/health", headers={"x-request-id": "abc-123"})
    assert answer.headers.get_list("x-request-id") == ["abc-123"]
    check_recovery(server, "ray::ProxyActor", {})
    with pictures_in_flight(server, {}) as asked:
        assert server.stop() == 0, server.log.read_text()[-2000:]
        assert [future.result() for future in asked] == [200] * NUM_REQUESTS


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_clip_survives_a_killed_server(folder: Path, keys: dict[str, str]) -> None:
    server = start_with_keys(folder, "first")
    video = begin_clip(server, keys)
    kill(server, "")
    server.process.wait(timeout=30)
    server = start_with_keys(folder, "second")
    check_clip(server, keys, folder, video)
    assert server.stop() == 0
