"""Lines of the input: text, JSONL, CSV and Parquet, from files, globs, URLs or standard input.

Everything is streamed. A line that is too long or not UTF-8 is handed on as a mistake, and the next line is read.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, Any, Literal, get_args

import fsspec

from serving.errors import APIError, invalid

InputFormat = Literal["txt", "jsonl", "csv", "parquet"]
SUFFIXES: dict[str, InputFormat] = {
    ".txt": "txt",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".parquet": "parquet",
}
COMPRESSED = (".gz", ".bz2", ".xz")
MAX_LINE_BYTES = 64 * 1024
"""Longest line that is read, as long as the longest body that the server reads by default."""
CHUNK_BYTES = 2**16
PARQUET_ROWS = 64
"""Rows of a Parquet file that are in memory at once, beside its own pages."""
STDIN = "-"
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Line:
    """One line of text or JSON, or one row of CSV or Parquet."""

    source: str
    """Name of its file without suffix; empty if there is only one file."""
    number: int
    """Number of the line in its file, from 1; in CSV of the line where the row begins."""
    content: bytes | dict[str, Any] | APIError
    """JSON, decoded fields, or why there are none."""
    is_text: bool = False
    """Whether the values of all fields are text."""
    share: float | None = None
    """Share of the input that is read after this line, 0..1; None if unknown."""


@dataclass(frozen=True)
class Source:
    """One file of the input."""

    path: str
    """As fsspec reads it, or "-" for standard input."""
    name: str
    """See `Line.source`."""
    format: InputFormat
    num_bytes: int | None
    """None if unknown: compressed, or standard input."""


def find_sources(path: str, given: InputFormat | None = None) -> list[Source]:
    """Return the files of an input, in order of their names.

    Args:
        path: a file, a glob or a URL of either; "-" is standard input.
        given: format of all files; None takes it from each suffix.

    Raises:
        ValueError: there is no file, or a format is unknown.
    """
    if path == STDIN:
        return [Source(STDIN, "", given or "txt", None)]
    try:
        filesystem, pattern = fsspec.core.url_to_fs(path)
        is_file = filesystem.isfile(pattern)  # a name may contain [ or *
        found = [pattern] if is_file else sorted(map(str, filesystem.glob(pattern)))
        found = [each for each in found if is_file or filesystem.isfile(each)]
    except ImportError as error:
        raise ValueError(f"{path} cannot be opened ({error})") from None
    if not found:
        raise ValueError(f"{path} is no file and matches none; name a file, a glob, a URL or - for standard input")
    root = PurePosixPath(found[0]).parent if len(found) == 1 else _common_folder(found)
    sources = []
    for each in found:
        suffixes = [suffix.lower() for suffix in PurePosixPath(each).suffixes]
        is_compressed = bool(suffixes) and suffixes[-1] in COMPRESSED
        suffix = (suffixes[:-1] if is_compressed else suffixes)[-1:]
        file_format = given or (SUFFIXES.get(suffix[0]) if suffix else None)
        if file_format is None:
            kinds = ", ".join(get_args(InputFormat))
            raise ValueError(f"{each} ends in none of {', '.join(SUFFIXES)}; say --input-format {kinds}")
        name = str(PurePosixPath(each).relative_to(root)).partition(".")[0] if len(found) > 1 else ""
        sources.append(
            Source(
                filesystem.unstrip_protocol(each), name, file_format, None if is_compressed else filesystem.size(each)
            )
        )
    return sources


def read_lines(sources: list[Source]) -> Iterator[Line]:
    """Yield every line that is not blank.

    Raises:
        OSError, ValueError: a file cannot be read as a whole, for example Parquet that is cut short.
    """
    sizes = [source.num_bytes for source in sources]
    total = sum(size for size in sizes if size is not None) if None not in sizes else 0
    before = 0
    for source in sources:
        span = (before / total, (source.num_bytes or 0) / total) if total else None
        readers = {"txt": _text, "jsonl": _jsonl, "csv": _csv, "parquet": _parquet}
        with _opened(source) as stream:
            yield from readers[source.format](source, stream, span)
        before += source.num_bytes or 0


Span = tuple[float, float] | None
"""Share of the input before a file, and share of the file itself."""


def _opened(source: Source) -> IO[bytes]:
    if source.path == STDIN:
        return sys.stdin.buffer
    stream: IO[bytes] = fsspec.open(source.path, "rb", compression="infer").open()
    return stream


def _common_folder(paths: list[str]) -> PurePosixPath:
    folders = [PurePosixPath(path).parent for path in paths]
    common = folders[0]
    while not all(common == folder or common in folder.parents for folder in folders):
        common = common.parent
    return common


def _share(source: Source, span: Span, position: int) -> float | None:
    return None if span is None or not source.num_bytes else span[0] + span[1] * min(1.0, position / source.num_bytes)


def _bounded(stream: IO[bytes]) -> Iterator[tuple[int, bytes | None, int]]:
    """Yield (number, line without its end, position after it). None stands for a line that is too long."""
    number = position = 0
    while line := stream.readline(MAX_LINE_BYTES + 2):
        number, position = number + 1, position + len(line)
        is_cut = not line.endswith(b"\n") and len(line) > MAX_LINE_BYTES
        part = line
        while is_cut and part and not part.endswith(b"\n"):
            part = stream.readline(CHUNK_BYTES)
            position += len(part)
        if number == 1:
            line = line.removeprefix(BOM)
        yield number, None if is_cut else line.rstrip(b"\r\n"), position


def _too_long() -> APIError:
    return invalid(f"the line is longer than {MAX_LINE_BYTES} bytes; shorten it", None, "invalid_value")


def _text(source: Source, stream: IO[bytes], span: Span) -> Iterator[Line]:
    for number, line, position in _bounded(stream):
        share = _share(source, span, position)
        if line is None:
            yield Line(source.name, number, _too_long(), share=share)
        elif line.strip():
            try:
                yield Line(source.name, number, {"prompt": line.decode("utf-8")}, share=share)
            except UnicodeDecodeError as error:
                message = f"the line is not UTF-8 (byte {error.start}); encode it as UTF-8"
                yield Line(source.name, number, invalid(message, None, "invalid_value"), share=share)


def _jsonl(source: Source, stream: IO[bytes], span: Span) -> Iterator[Line]:
    for number, line, position in _bounded(stream):
        if line is None or line.strip():
            yield Line(source.name, number, _too_long() if line is None else line, share=_share(source, span, position))


def _csv(source: Source, stream: IO[bytes], span: Span) -> Iterator[Line]:
    """Yield rows by the names in the first row. An empty cell is a field that is left out."""
    positions = [0, 0]  # number of the last line that was taken, and its end

    def texts() -> Iterator[str]:
        for number, line, position in _bounded(stream):
            positions[:] = number, position
            yield "\0" if line is None else line.decode("utf-8", "surrogateescape") + "\n"

    reader = csv.reader(texts())
    header: list[str] | None = None
    while True:
        began = positions[0] + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            message = f"the row is not CSV ({str(error)[:80]}); is a quote left open?"
            yield Line(source.name, began, invalid(message, None, "invalid_value"))
            continue
        share = _share(source, span, positions[1])
        if header is None:
            header = row
        elif row:
            yield Line(source.name, began, _row(header, row), is_text=True, share=share)


def _row(header: list[str], row: list[str]) -> dict[str, Any] | APIError:
    if row == ["\0"]:
        return _too_long()
    if len(row) > len(header):
        message = f"the row has {len(row)} cells and the header {len(header)}; quote cells that contain commas"
        return invalid(message, None, "invalid_value")
    if any("\udc80" <= character <= "\udcff" for cell in row for character in cell):
        return invalid("the row is not UTF-8; encode it as UTF-8", None, "invalid_value")
    return {name: cell for name, cell in zip(header, row, strict=False) if cell}


def _parquet(source: Source, stream: IO[bytes], span: Span) -> Iterator[Line]:
    """Yield rows. A null is a field that is left out."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(io.BytesIO(stream.read()) if source.path == STDIN else stream)
        number, num_rows = 0, file.metadata.num_rows
        for batch in file.iter_batches(batch_size=PARQUET_ROWS):
            for index in range(batch.num_rows):
                number += 1
                share = None if span is None else span[0] + span[1] * number / num_rows
                yield Line(source.name, number, _parquet_row(batch, index), share=share)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{source.path} cannot be read as Parquet: {str(error)[:200]}") from None


def _parquet_row(batch: Any, index: int) -> dict[str, Any] | APIError:
    try:
        cells = {name: batch.column(name)[index].as_py() for name in batch.schema.names}
    except UnicodeDecodeError:
        return invalid("the row is not UTF-8; encode it as UTF-8", None, "invalid_value")
    return {name: cell for name, cell in cells.items() if cell is not None}
