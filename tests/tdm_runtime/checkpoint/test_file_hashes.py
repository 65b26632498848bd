"""A file is hashed once, and again only if it may have changed."""

from __future__ import annotations

import os
import pickle
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tdm_runtime.checkpoint import file_hashes
from tdm_runtime.checkpoint.file_hashes import FileHashes
from tdm_runtime.checkpoint.folder import DEFAULT_CHECKPOINT, open_checkpoint
from tdm_runtime.checkpoint.folder_files import other_files, weight_files
from tdm_runtime.checkpoint.recipe import RECIPE_FILE
from tdm_runtime.errors import CheckpointError
from tdm_runtime.families import FAMILIES

FAMILY = FAMILIES["stable_diffusion"]
WEIGHT_FILES = weight_files(DEFAULT_CHECKPOINT, FAMILY)


@pytest.fixture
def copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


def flip_bit(file: Path) -> None:
    """Damage a file in place: same size, same inode, same modification time."""
    before = file.stat()
    with file.open("r+b") as stream:
        stream.seek(before.st_size // 2)
        (byte,) = stream.read(1)
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ 1]))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_second_process_with_known_hashes_hashes_nothing(copy: Path, hashed: Counter[Path]) -> None:
    hashes = FileHashes()
    first = open_checkpoint(copy, hashes)
    names = {*first.recipe.files, *WEIGHT_FILES, *other_files(copy, FAMILY), RECIPE_FILE}
    expected = (first.digest, first.fingerprint)
    second = open_checkpoint(copy, pickle.loads(pickle.dumps(hashes)))
    assert (second.digest, second.fingerprint) == expected
    assert hashed == {copy / name: 1 for name in names}


def test_without_known_hashes_every_weight_file_is_hashed(copy: Path, hashed: Counter[Path]) -> None:
    for _ in range(2):
        open_checkpoint(copy)
    assert {hashed[copy / name] for name in WEIGHT_FILES} == {2}


def replace(file: Path) -> None:
    other = file.with_suffix(".other")
    shutil.copy2(file, other)
    other.replace(file)


@pytest.mark.parametrize("change", [os.utime, replace], ids=["touched", "replaced by a copy"])
def test_a_file_that_may_have_changed_is_hashed_again(
    copy: Path, hashed: Counter[Path], change: Callable[[Path], None]
) -> None:
    hashes, weights = FileHashes(), copy / WEIGHT_FILES[0]
    open_checkpoint(copy, hashes)
    change(weights)
    open_checkpoint(copy, hashes)
    assert (hashed[weights], hashed[copy / WEIGHT_FILES[1]]) == (2, 1)


def test_another_machine_hashes_every_file_again(
    copy: Path, hashed: Counter[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    hashes = FileHashes()
    open_checkpoint(copy, hashes)
    monkeypatch.setattr(file_hashes, "_machine", lambda: "another")
    open_checkpoint(copy, hashes)
    assert {hashed[copy / name] for name in WEIGHT_FILES} == {2}


@pytest.mark.parametrize("name", WEIGHT_FILES)
def test_damage_after_the_first_check_is_found(copy: Path, name: str) -> None:
    hashes = FileHashes()
    open_checkpoint(copy, hashes)
    flip_bit(copy / name)
    with pytest.raises(CheckpointError, match="is damaged or of another checkpoint"):
        open_checkpoint(copy, hashes)
