"""The output folder: a local one, or any place that fsspec opens. A file appears as a whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from typing import IO

import fsspec

WORK = ".tdm-render"
"""Folder of an unfinished run, inside the output folder. It is deleted when the run ends."""


class Storage:
    """Files by names relative to the output folder. It can be pickled."""

    def __init__(self, url: str) -> None:
        """
        Raises:
            ValueError: fsspec does not know the kind of URL, or the package for it is not installed.
        """
        self.url = url
        try:
            self._fs, root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise ValueError(f"nothing can be written to {url.split('://')[0]}:// ({error})") from None
        self.is_local = isinstance(self._fs, fsspec.get_filesystem_class("file"))
        self._root = os.path.realpath(str(root)) if self.is_local else str(root).rstrip("/")
        self._folders: set[str] = set()
        """Folders that were made, or found inside the root."""

    def __reduce__(self) -> tuple[object, ...]:
        return Storage, (self.url,)

    def put(self, name: str, content: bytes | Iterable[bytes]) -> None:
        """Write a file, in place of one of the same name.

        Raises:
            OSError: it cannot be written. Nothing is left of it.
        """
        parts = [content] if isinstance(content, bytes) else content
        path = self._made_path(name)
        if not self.is_local:  # an object in a store appears when it is complete
            with self._fs.open(path, "wb") as stream:
                for part in parts:
                    stream.write(part)
            return
        draft = self._made_path(f"{WORK}/drafts/{uuid.uuid4().hex}")
        try:
            with open(draft, "wb") as stream:
                for part in parts:
                    stream.write(part)
            os.replace(draft, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(draft)
            raise

    def open(self, name: str) -> IO[bytes] | None:
        """Open a file for reading. Return None if it does not exist."""
        try:
            stream: IO[bytes] = (open if self.is_local else self._fs.open)(self._path(name), "rb")
        except (FileNotFoundError, NotADirectoryError):
            return None
        return stream

    def get(self, name: str) -> bytes | None:
        """Return the content of a file, or None if it does not exist."""
        if (stream := self.open(name)) is None:
            return None
        with stream:
            return stream.read()

    def lines(self, name: str) -> Iterator[bytes]:
        """Yield the complete lines of a file, none if it does not exist. What a killed process left is skipped."""
        if (stream := self.open(name)) is None:
            return
        with stream:
            yield from (line for line in stream if line.endswith(b"\n"))

    def names(self, folder: str) -> list[str]:
        """Return the names of the files in a folder, sorted; none if it does not exist."""
        try:
            found = self._fs.ls(self._path(f"{folder}/x").rpartition("/")[0], detail=False)
        except FileNotFoundError:
            return []
        return sorted(f"{folder}/{str(path).rstrip('/').rpartition('/')[2]}" for path in found)

    def delete(self, name: str) -> None:
        """Delete a file, if it exists."""
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._path(name))

    def drop(self, folder: str) -> None:
        """Delete a folder and all that is in it."""
        path = self._path(f"{folder}/x").rpartition("/")[0]
        if self.is_local:
            shutil.rmtree(path, ignore_errors=True)
            self._folders.clear()
        elif self._fs.exists(path):
            self._fs.rm(path, recursive=True)

    def append_to(self, name: str) -> io.FileIO | None:
        """Open a local file that grows line by line. Return None where files cannot grow."""
        if not self.is_local:
            return None
        stream = io.FileIO(self._made_path(name), "ab")
        if stream.tell():
            stream.write(b"\n")  # ends a line that a kill tore
        return stream

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this run, where it is local.

        Raises:
            ValueError: another run has it.
        """
        if not self.is_local:
            yield
            return
        path = self._made_path(f"{WORK}/lock")
        with open(path, "wb") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"another run writes to {self.url}; wait for it, or name another folder") from None
            yield

    def _path(self, name: str) -> str:
        assert not name.startswith("/") and ".." not in name.split("/"), "names are checked when they are made"
        return f"{self._root}/{name}"

    def _made_path(self, name: str) -> str:
        """Return the path of a file to write, and make its folder.

        Raises:
            OSError: a symbolic link leads out of the output folder.
        """
        path = self._path(name)
        folder = path.rpartition("/")[0]
        if folder not in self._folders:
            self._fs.makedirs(folder, exist_ok=True)
            real = os.path.realpath(folder) if self.is_local else folder
            if real != self._root and not real.startswith(f"{self._root}{os.sep}"):
                raise OSError(f"{folder} is a symbolic link out of the output folder; remove it")
            self._folders.add(folder)
        return path
