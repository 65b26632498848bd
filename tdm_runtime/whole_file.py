"""Files put in their place: written whole, so that no reader sees half of one, or taken over from elsewhere."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path


def write_whole(file: Path, content: bytes | memoryview) -> None:
    """Write a file beside `file` and put it in its place: the whole file or nothing.

    Raises:
        OSError: it cannot be written. Nothing is left behind.
    """
    partial = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        partial.write_bytes(content)
        partial.replace(file)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def link_or_copy(source: Path, target: Path) -> None:
    """Put a file at `target`, where none is: a link to it, or a copy where the file system has no links.

    Raises:
        OSError: it can be neither linked nor copied.
    """
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copy2(source, target)
