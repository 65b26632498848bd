"""Kept files are complete, are found only by their id, and expire, in a folder and in another store."""

from __future__ import annotations

import time
from pathlib import Path

import httpx
import pytest

from serving.errors import APIError
from serving.jobs.artifacts import FOLDER_S, ID_PATTERN, ArtifactStore
from tests.serving.conftest import RunningServer

HOSTILE = [
    "",
    ".",
    "..",
    "../jobs.db",
    "..%2f..%2fetc%2fpasswd",
    "/etc/passwd",
    "a" * 32 + "-ffffffff.exe",
    "a" * 32 + "-ffffffff.png\n",
    "a" * 32 + "-ffffffff.png/../x",
    "\N{FULLWIDTH LATIN SMALL LETTER A}" * 32 + "-ffffffff.png",
    "a" * 100_000,
]


def soon() -> int:
    return int(time.time()) + 100


@pytest.fixture(params=["folder", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(str(tmp_path / "kept") if request.param == "folder" else f"memory://{tmp_path.name}")


def test_a_kept_file_can_be_read_in_full_and_in_part(store: ArtifactStore) -> None:
    name = store.put(b"0123456789", "png", soon())
    assert ID_PATTERN.fullmatch(name)
    found = store.find(name)
    assert (found.media_type, found.num_bytes) == ("image/png", 10)
    assert 90 < found.remaining_s <= 100
    assert store.get(name) == b"0123456789"
    assert b"".join(store.read(name, 3, 6)) == b"345"
    assert store.get(store.put(iter([b"ab", b"", b"cd"]), "jsonl", soon())) == b"abcd"


def test_ids_of_equal_files_differ(store: ArtifactStore) -> None:
    assert len({store.put(b"", "png", soon()) for _ in range(20)}) == 20


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_that_is_not_an_id_is_not_found(store: ArtifactStore, name: str) -> None:
    with pytest.raises(APIError) as caught:
        store.find(name)
    assert caught.value.status == 404
    assert len(caught.value.message) < 200
    store.delete(name)


def test_an_expired_file_is_not_found_and_a_sweep_deletes_it(store: ArtifactStore) -> None:
    expired = store.put(b"a", "png", int(time.time()) - 1)
    old = store.put(b"a", "png", int(time.time()) - 2 * FOLDER_S)
    kept = store.put(b"a", "png", soon() + 2 * FOLDER_S)
    for name in (expired, old):
        with pytest.raises(APIError):
            store.find(name)
    assert store.sweep() == 1
    assert store.sweep() == 0
    assert store.get(kept) == b"a"


def test_a_deleted_file_is_not_found_and_can_be_deleted_again(store: ArtifactStore) -> None:
    name = store.put(b"a", "png", soon())
    store.delete(name)
    store.delete(name)
    with pytest.raises(APIError):
        store.get(name)


def test_a_file_whose_writing_fails_has_no_id(tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path))

    def broken() -> object:
        yield b"a"
        raise RuntimeError

    with pytest.raises(RuntimeError):
        store.put(broken(), "png", soon())  # type: ignore[arg-type]
    assert all(file.name.startswith(".") for file in tmp_path.rglob("*.png")), "only a draft may be left"


def test_a_symbolic_link_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path / "kept"))
    name = store.put(b"a", "png", soon())
    (file,) = (tmp_path / "kept").rglob("*.png")
    file.unlink()
    (tmp_path / "secret").write_text("secret")
    file.symlink_to(tmp_path / "secret")
    with pytest.raises(APIError):
        store.find(name)


def test_a_sweep_leaves_other_folders_alone(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "1").write_text("mine")
    ArtifactStore(str(tmp_path)).sweep()
    assert (tmp_path / "notes" / "1").exists()


# -- over HTTP -------------------------------------------------------------------------------------


def test_a_picture_can_be_requested_as_a_url(http: httpx.Client, server: RunningServer) -> None:
    body = {"prompt": "a red heart", "seed": 7, "n": 2, "num_inference_steps": 1}
    answer = http.post("/v1/images/generations", json=body | {"response_format": "url"}).json()
    inline = http.post("/v1/images/generations", json=body).json()
    for found, picture in zip(answer["data"], inline["data"], strict=True):
        assert found["b64_json"] is None and found["url"].startswith(f"{server.url}/v1/files/")
        file = httpx.get(found["url"])
        assert file.status_code == 200 and file.content.startswith(b"\x89PNG")
        assert file.headers["content-type"] == "image/png"
        assert file.headers["content-length"] == str(len(file.content))
        assert file.headers["x-content-type-options"] == "nosniff"
        visibility, age = file.headers["cache-control"].split(", max-age=")
        assert visibility == "private" and 0 < int(age) <= found["expires_at"] - time.time() + 2
        assert found["receipt"]["prompt"] == picture["receipt"]["prompt"]
        part = httpx.get(found["url"], headers={"range": "bytes=1-3"})
        assert (part.status_code, part.content) == (206, b"PNG")
        assert part.headers["content-range"] == f"bytes 1-3/{len(file.content)}"
        beyond = httpx.get(found["url"], headers={"range": "bytes=9999999-"})
        assert beyond.status_code == 416 and "error" in beyond.json()


@pytest.mark.parametrize("name", ["a" * 32 + "-ffffffff.png", "..%2fjobs.db", "%2e%2e%2f%2e%2e%2fetc%2fpasswd", "x"])
def test_an_unknown_file_is_a_404_in_the_shape_of_the_api(http: httpx.Client, name: str) -> None:
    answer = http.get(f"/v1/files/{name}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


def test_a_url_is_refused_together_with_a_stream_or_an_image_type(http: httpx.Client) -> None:
    body = {"prompt": "a", "response_format": "url"}
    for answer in (
        http.post("/v1/images/generations", json=body | {"stream": True}),
        http.post("/v1/images/generations", json=body, headers={"accept": "image/png"}),
    ):
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "response_format")
