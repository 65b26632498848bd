"""Pictures that lines of a file name, to edit them."""

from __future__ import annotations

import posixpath
from dataclasses import dataclass
from typing import Any

import fsspec

from serving.errors import invalid, shown_json
from serving.offline.lines import STDIN, Source

FILES = ("image", "mask")
"""Fields that name files."""
MAX_BYTES = 2**26
"""Largest file that is read."""


@dataclass(frozen=True)
class Folder:
    """Folder that the paths of a file's lines start from."""

    url: str
    """As fsspec reads it."""

    @classmethod
    def of(cls, source: Source) -> Folder:
        """Return the folder of a file; of standard input, the working folder."""
        return cls("" if source.path == STDIN else posixpath.dirname(source.path))

    def with_pictures(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Return the fields of a line with the content of the files that `image` and `mask` name.

        Raises:
            APIError: 400, a file cannot be read.
        """
        return fields | {name: self._content(name, fields[name]) for name in FILES if fields.get(name) is not None}

    def _content(self, name: str, path: Any) -> bytes:
        if not isinstance(path, str) or not path or "://" in path:
            message = f"{name} is {shown_json(path)}; give the path of a picture, from the folder of the input"
            raise invalid(message, name, "invalid_value")
        try:
            with fsspec.open(posixpath.join(self.url, path), "rb") as stream:
                content: bytes = stream.read(MAX_BYTES + 1)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or type(error).__name__
            raise invalid(f"{name} {path[:200]!r} cannot be read: {reason}", name, "invalid_value") from None
        if len(content) > MAX_BYTES:
            raise invalid(
                f"{name} {path[:200]!r} has more than {MAX_BYTES} bytes; scale it down", name, "invalid_value"
            )
        return content
