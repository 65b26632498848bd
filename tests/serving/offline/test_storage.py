"""Files of the output appear as a whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from serving.offline.storage import WORK, Storage


def test_a_file_is_whole_whenever_it_is_read(tmp_path: Path) -> None:
    storage, file = Storage(str(tmp_path)), tmp_path / "a" / "x.png"
    seen = []

    def parts(mark: bytes) -> Iterator[bytes]:
        for _ in range(3):
            seen.append(file.read_bytes() if file.exists() else None)
            yield mark * 2**16

    storage.put("a/x.png", parts(b"1"))
    storage.put("a/x.png", parts(b"2"))
    assert seen == [None] * 3 + [b"1" * 3 * 2**16] * 3
    assert file.read_bytes() == b"2" * 3 * 2**16


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.put("x.png", b"old")

    def parts() -> Iterator[bytes]:
        yield b"new"
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        storage.put("x.png", parts())
    assert storage.get("x.png") == b"old"
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["x.png"]
    storage.drop(WORK)
    assert list(tmp_path.iterdir()) == [tmp_path / "x.png"]


def test_lines_that_a_kill_tore_are_not_read(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.put("log", b"one\ntwo\nthr")
    assert list(storage.lines("log")) == [b"one\n", b"two\n"]
    assert list(storage.lines("no")) == [] and storage.names("no") == []
