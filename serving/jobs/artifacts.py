"""Files that the server made and keeps for a while: pictures, clips and outputs of batches.

The id of a file is its only record: 192 random bits, the time of expiry and the file type. So there is no index that
could be lost or contradict the files, and the files of a process that died are found by their names.
"""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import fsspec

from serving.config import ServerConfig
from serving.errors import APIError, invalid
from serving.schema.answers import ImageAnswer

MEDIA_TYPES = {
    "png": "image/png",
    "webp": "image/webp",
    "jpeg": "image/jpeg",
    "gif": "image/gif",
    "mp4": "video/mp4",
    "webm": "video/webm",
    "jsonl": "application/jsonl",
}
"""Media type of each extension of an id."""
ID_PATTERN = re.compile(rf"[A-Za-z0-9_-]{{32}}-([0-9a-f]{{8}})\.({'|'.join(MEDIA_TYPES)})", re.ASCII)
FOLDER_S = 3600
"""Span of a folder, in seconds. Files that expire within the same hour share a folder and are deleted with it."""
CHUNK_BYTES = 2**20


@dataclass(frozen=True)
class Artifact:
    """A kept file."""

    id: str
    media_type: str
    num_bytes: int
    expires_at: int
    """Unix seconds."""

    @property
    def remaining_s(self) -> int:
        """Seconds until it expires."""
        return max(0, self.expires_at - int(time.time()))


class ArtifactStore:
    """Files in a folder, or at a URL that fsspec opens. Its methods block: do not call them in an event loop."""

    def __init__(self, url: str) -> None:
        """
        Raises:
            ValueError: fsspec does not know the kind of URL, or the package for it is not installed.
            OSError: the folder cannot be made.
        """
        try:
            self._fs, root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise ValueError(
                f"files cannot be kept at {url.split('://')[0]}:// ({error}); see --artifacts-url"
            ) from None
        self._root = str(root).rstrip("/")
        self._is_local = isinstance(self._fs, fsspec.get_filesystem_class("file"))
        if self._is_local:
            Path(self._root).mkdir(parents=True, exist_ok=True, mode=0o700)
            self._root = os.path.realpath(self._root)

    def put(self, content: bytes | Iterable[bytes], extension: str, expires_at: int) -> str:
        """Keep a file. It appears as a whole or not at all.

        Args:
            content: the whole file, or its parts in order.
            extension: one of `MEDIA_TYPES`.
            expires_at: time of expiry, in Unix seconds.

        Returns:
            Id of the file. A client that knows the id may read the file.
        """
        assert extension in MEDIA_TYPES, "the server makes no other files"
        name = f"{secrets.token_urlsafe(24)}-{expires_at:08x}.{extension}"
        path, draft = self._path(name), self._path(f".{name}")
        self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        # An object in a store appears when it is complete. A local file is written under another name first.
        with self._fs.open(draft if self._is_local else path, "wb") as stream:
            for part in [content] if isinstance(content, bytes) else content:
                stream.write(part)
            if self._is_local:
                stream.flush()
                os.fsync(stream.fileno())
        if self._is_local:
            os.replace(draft, path)
        return name

    def publish(self, answer: ImageAnswer, base_url: str, ttl_s: float) -> tuple[list[str], int]:
        """Keep the pictures of an answer. Returns their URLs and the time of expiry in Unix seconds."""
        expires_at = int(time.time() + ttl_s)
        names = [self.put(image.content, answer.output_format, expires_at) for image in answer.images]
        return [f"{base_url}/v1/files/{name}" for name in names], expires_at

    def find(self, name: str) -> Artifact:
        """Return the file with this id.

        Raises:
            APIError: 404, the file does not exist or has expired.
        """
        match = ID_PATTERN.fullmatch(name)
        if match is None or int(match[1], 16) <= time.time():
            raise _not_found(name)
        try:
            num_bytes = int(self._fs.size(self._path(name)))
        except FileNotFoundError:
            raise _not_found(name) from None
        return Artifact(name, MEDIA_TYPES[match[2]], num_bytes, int(match[1], 16))

    def read(self, name: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """Yield the content of a file, in parts. Call `find` first.

        Args:
            start: first byte.
            end: byte after the last one. None reads to the end of the file.
        """
        with self._fs.open(self._path(name), "rb") as stream:
            stream.seek(start)
            left = None if end is None else end - start
            while part := stream.read(CHUNK_BYTES if left is None else min(CHUNK_BYTES, left)):
                yield part
                left = None if left is None else left - len(part)

    def get(self, name: str) -> bytes:
        """Return the whole content of a file.

        Raises:
            APIError: 404, the file does not exist or has expired.
        """
        return b"".join(self.read(self.find(name).id))

    def delete(self, name: str) -> None:
        """Delete a file, if it exists."""
        if ID_PATTERN.fullmatch(name):
            try:
                self._fs.rm_file(self._path(name))
            except FileNotFoundError:
                return

    def sweep(self) -> int:
        """Delete expired files, one hour's folder at a time. Returns the number of deleted folders."""
        try:
            folders = self._fs.ls(self._root, detail=False)
        except FileNotFoundError:
            return 0
        past = 0
        for folder in map(str, folders):
            hour = folder.rstrip("/").rpartition("/")[2]
            if re.fullmatch(r"[0-9]{1,9}", hour, re.ASCII) and (int(hour) + 1) * FOLDER_S <= time.time():
                self._fs.rm(folder, recursive=True)
                past += 1
        return past

    def _path(self, name: str) -> str:
        """Return the path of a file. It is never outside the root."""
        match = ID_PATTERN.fullmatch(name.removeprefix("."))
        assert match is not None, "an id is checked before it becomes a path"
        path = f"{self._root}/{int(match[1], 16) // FOLDER_S}/{name}"
        if self._is_local and not os.path.realpath(path).startswith(f"{self._root}{os.sep}"):
            raise _not_found(name)  # a symbolic link leads out of the root
        return path


def open_artifacts(config: ServerConfig) -> ArtifactStore:
    """Return the store of a configuration.

    Raises:
        ValueError, OSError: the store cannot be used.
    """
    return ArtifactStore(config.artifacts_url or str(config.state_folder / "artifacts"))


def _not_found(name: str) -> APIError:
    return invalid(f"file {name[:64]!r} does not exist here or has expired", "file_id", "not_found", 404)
