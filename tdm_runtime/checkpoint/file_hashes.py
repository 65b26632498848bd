"""sha256 of files, each computed once a start, and as a recipe lists them."""

from __future__ import annotations

import hashlib
import platform
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from tdm_runtime.errors import RecipeError


class FileHashes:
    """sha256 of files, each computed once for as long as its file stays as it is.

    Pickled, they serve other processes of the same machine. A file is hashed again when its size, times or inode have
    changed, and on another machine.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], str] = {}

    def sha256(self, file: Path) -> str:
        """Return the hex sha256 of a file.

        Raises:
            OSError: the file cannot be read.
        """
        path, stat = file.resolve(), file.stat()
        times_ns = stat.st_mtime_ns, stat.st_ctime_ns
        state = (_machine(), str(path), stat.st_dev, stat.st_ino, stat.st_size, *times_ns)
        if state not in self._known:
            self._known[state] = file_sha256(file)
        return self._known[state]


def file_sha256(file: Path) -> str:
    """Return the hex sha256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@cache
def _machine() -> str:
    """Return what tells this machine, since its last start, from others."""
    boot_id = Path("/proc/sys/kernel/random/boot_id")
    return f"{platform.node()} {boot_id.read_text(encoding='ascii').strip() if boot_id.is_file() else ''}"


def parse_hashes(raw: Any) -> Mapping[str, str]:
    """Read a recipe's `files`: weight file, relative to the checkpoint folder -> its sha256.

    Raises:
        RecipeError: a path leaves the folder, or a hash is none.
    """
    if not isinstance(raw, dict):
        raise RecipeError(f"files must map weight files to their sha256, got {raw!r}")
    for name, sha256 in raw.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or not path.name:
            raise RecipeError(f"files names {name!r}; a path inside the checkpoint folder is allowed")
        if not isinstance(sha256, str) or not re.fullmatch("[0-9a-f]{64}", sha256):
            raise RecipeError(f"files says that the sha256 of {name!r} is {sha256!r}; it has 64 digits 0-9a-f")
    return dict(raw)
