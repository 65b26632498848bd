"""Files that a reader never sees half written."""

from __future__ import annotations

import contextlib
import os
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
