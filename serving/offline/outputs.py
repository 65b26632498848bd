"""Where pictures end: files in folders, shards of WebDataset (tar), or Parquet files. The same pictures give the same
bytes: no date, owner or order of arrival is written."""

from __future__ import annotations

import contextlib
import hashlib
import json
import tarfile
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import IO, Any, Literal, Protocol

from serving.offline.plan import Chunk, Unit
from serving.offline.records import Entry, Fields
from serving.offline.storage import WORK, Storage

OutputKind = Literal["files", "webdataset", "parquet"]
PICTURES = f"{WORK}/pictures"
"""Finished pictures of shards that are not finished."""
COPIED_BYTES = 2**20
ROW_GROUP = 64
"""Rows of a row group of Parquet."""


class Output(Protocol):
    """Form of the output. A picture is saved when it is made; a chunk is sealed when it has all its pictures."""

    def place(self, chunk: Chunk, unit: Unit) -> Fields:
        """Return the fields of the record that say where the picture will be."""

    def is_sealed(self, chunk: Chunk) -> bool:
        """Whether an earlier run sealed just these pictures, and they are whole."""

    def save(self, unit: Unit, content: bytes) -> None:
        """Keep a finished picture."""

    def load(self, record: Fields, unit: Unit) -> bytes | None:
        """Return a picture that was saved, unless it is in a sealed chunk; None if it is gone."""

    def seal(self, chunk: Chunk, entries: Sequence[Entry]) -> list[Entry]:
        """Bring a chunk into its final form. Returns its entries, which may say more now."""

    def tidy(self, chunk: Chunk) -> None:
        """Delete what a sealed chunk, whose entries are written, no longer needs."""

    def pictures(self, records: Sequence[Fields]) -> Iterator[bytes | None]:
        """Yield the pictures of sealed chunks; None for one that is gone."""


class Files:
    """A file for each picture."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def place(self, chunk: Chunk, unit: Unit) -> Fields:
        return {"file": unit.name}

    def is_sealed(self, chunk: Chunk) -> bool:
        return False  # each picture is looked at by itself

    def tidy(self, chunk: Chunk) -> None:
        return

    def save(self, unit: Unit, content: bytes) -> None:
        self._storage.put(unit.name, content)

    def load(self, record: Fields, unit: Unit) -> bytes | None:
        return self._storage.get(unit.name) if record.get("file") == unit.name and "member" not in record else None

    def seal(self, chunk: Chunk, entries: Sequence[Entry]) -> list[Entry]:
        return list(entries)

    def pictures(self, records: Sequence[Fields]) -> Iterator[bytes | None]:
        return (self._storage.get(record["file"]) for record in records)


class Shards(ABC):
    """A file for each chunk. Until it is sealed, each picture is a file of its own in the folder of the run."""

    suffix: str

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def place(self, chunk: Chunk, unit: Unit) -> Fields:
        return {"file": self._file(chunk), "member": unit.name}

    def is_sealed(self, chunk: Chunk) -> bool:
        units = [unit for unit in chunk.units if unit.order is not None]
        hashes: set[str | None] = set()
        for unit in units:
            record = {} if unit.known is None else unit.known.record
            wanted = unit.base() | self.place(chunk, unit) | {"file_pictures": len(units)}
            hashes.add(record.get("file_sha256") if wanted.items() <= record.items() else None)
        return len(hashes) == 1 and None not in hashes and self._sha256(self._file(chunk)) in hashes

    def tidy(self, chunk: Chunk) -> None:
        for unit in chunk.units:
            if unit.order is not None:
                self._storage.delete(f"{PICTURES}/{unit.name}")

    def _file(self, chunk: Chunk) -> str:
        return f"{chunk.number:06d}.{self.suffix}"

    def save(self, unit: Unit, content: bytes) -> None:
        self._storage.put(f"{PICTURES}/{unit.name}", content)

    def load(self, record: Fields, unit: Unit) -> bytes | None:
        return self._storage.get(f"{PICTURES}/{unit.name}")

    def seal(self, chunk: Chunk, entries: Sequence[Entry]) -> list[Entry]:
        made = [entry for entry in entries if entry.is_completed]
        if not made:
            return list(entries)
        self._storage.put(self._file(chunk), self._packed([entry.record for entry in made]))
        whole = {"file_sha256": self._sha256(self._file(chunk)), "file_pictures": len(made)}
        return [Entry(each.record | whole, each.times) if each.is_completed else each for each in entries]

    def pictures(self, records: Sequence[Fields]) -> Iterator[bytes | None]:
        for file, group in groupby(records, key=lambda record: str(record["file"])):
            members = [record["member"] for record in group]
            stream = self._storage.open(file)
            with stream or contextlib.nullcontext():
                found = {} if stream is None else self._found(stream, set(members))
            yield from (found.get(member) for member in members)

    def _sha256(self, name: str) -> str | None:
        if (stream := self._storage.open(name)) is None:
            return None
        with stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]

    def _saved(self, record: Fields) -> bytes:
        content = self._storage.get(f"{PICTURES}/{record['member']}")
        if content is None:
            raise OSError(f"{PICTURES}/{record['member']} was deleted while the run needed it; start the run again")
        return content

    @abstractmethod
    def _packed(self, records: Sequence[Fields]) -> Iterable[bytes]:
        """Return the bytes of a shard, in parts."""

    @abstractmethod
    def _found(self, stream: IO[bytes], members: set[str]) -> dict[str, bytes]:
        """Return members of a shard by name."""


class WebDataset(Shards):
    """Tar files: KEY.png (or .mp4, ...), KEY.txt with the prompt and KEY.json with the record, one after the other."""

    suffix = "tar"

    def _packed(self, records: Sequence[Fields]) -> Iterator[bytes]:
        for record in records:
            key = record["member"].rpartition(".")[0]
            yield _tar_member(record["member"], self._saved(record))
            yield _tar_member(f"{key}.txt", record["receipt"]["prompt"].encode())
            yield _tar_member(f"{key}.json", json.dumps(record).encode())
        yield tarfile.NUL * (2 * tarfile.BLOCKSIZE)

    def _found(self, stream: IO[bytes], members: set[str]) -> dict[str, bytes]:
        with tarfile.open(fileobj=stream) as shard:
            files = [(member.name, shard.extractfile(member)) for member in shard if member.name in members]
            return {name: file.read() for name, file in files if file is not None}


def _tar_member(name: str, content: bytes) -> bytes:
    header = tarfile.TarInfo(name)
    header.size, header.mtime, header.mode = len(content), 0, 0o644
    padding = -len(content) % tarfile.BLOCKSIZE
    return header.tobuf(tarfile.PAX_FORMAT) + content + tarfile.NUL * padding


class Parquet(Shards):
    """Parquet files. Column `image` has a picture as {bytes, path}, `video` a clip, as `datasets` reads them; the other
    one is null. Every file has both, so that all files of all runs have one schema. Other columns are of the record."""

    suffix = "parquet"

    def _packed(self, records: Sequence[Fields]) -> Iterator[bytes]:
        import pyarrow
        import pyarrow.parquet

        schema = _parquet_schema(pyarrow)
        with tempfile.TemporaryFile() as stream:
            with pyarrow.parquet.ParquetWriter(stream, schema, compression="none") as writer:
                for start in range(0, len(records), ROW_GROUP):
                    rows = [self._row(record) for record in records[start : start + ROW_GROUP]]
                    writer.write_table(pyarrow.Table.from_pylist(rows, schema))
            stream.seek(0)
            while part := stream.read(COPIED_BYTES):
                yield part

    def _row(self, record: Fields) -> Fields:
        made = {"bytes": self._saved(record), "path": record["member"]}
        same = {name: record[name] for name in ("id", "line", "seed", "num_inference_steps", "model", "sha256")}
        receipt = record["receipt"]
        sizes = {name: receipt[name] for name in ("width", "height", "prompt")}
        column = "image" if receipt["frames"] is None else "video"
        return {column: made, **same, **sizes, "receipt": json.dumps(receipt)}

    def _found(self, stream: IO[bytes], members: set[str]) -> dict[str, bytes]:
        import pyarrow.parquet

        table = pyarrow.parquet.read_table(stream, columns=["image", "video"])
        made = (cell for column in table.columns for cell in column if cell.is_valid)
        return {cell["path"].as_py(): cell["bytes"].as_py() for cell in made if cell["path"].as_py() in members}


def _parquet_schema(pyarrow: Any) -> Any:
    text, number = pyarrow.string(), pyarrow.int64()
    made = pyarrow.struct([("bytes", pyarrow.binary()), ("path", text)])
    names: list[tuple[str, Any]] = [("image", made), ("video", made), ("id", text), ("line", number), ("seed", number)]
    names += [("num_inference_steps", number), ("model", text), ("sha256", text), ("width", number), ("height", number)]
    return pyarrow.schema([*names, ("prompt", text), ("receipt", text)])


OUTPUTS: dict[OutputKind, type[Files] | type[WebDataset] | type[Parquet]] = {
    "files": Files,
    "webdataset": WebDataset,
    "parquet": Parquet,
}
