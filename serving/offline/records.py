"""Lines of the manifest, and what an earlier run left of them.

An entry is one line of `manifest.jsonl`, which says everything that a repeated run gives again, and one of
`times.jsonl`, which says when the picture was made and how long it took.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from itertools import zip_longest
from typing import Any

from serving.offline.storage import WORK, Storage
from serving.schema.order import ImageOrder

MANIFEST = "manifest.jsonl"
TIMES = "times.jsonl"
PARTS = f"{WORK}/parts"
"""Entries of finished chunks, a file each, in order."""
JOURNALS = f"{WORK}/journals"
"""Entries of unfinished chunks, a file each, as pictures were finished."""
DONE = f"{WORK}/done.jsonl"
"""Entries of earlier runs that did not finish."""

FACTS = {"bytes", "sha256", "seed", "num_inference_steps", "model", "key", "receipt", "warnings"}
"""Fields of a finished picture's record that do not depend on where it is in input and output."""

Fields = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """What became of one picture, or of a line that asked for none that can be made."""

    record: Fields
    times: Fields

    @property
    def is_completed(self) -> bool:
        return bool(self.record["status"] == "completed")

    def to_line(self) -> bytes:
        return to_line({"record": self.record, "times": self.times})


def to_line(fields: Fields) -> bytes:
    return json.dumps(fields).encode() + b"\n"


def place_of(line_id: str, index: int, sweep: Mapping[str, Any]) -> Fields:
    """Return the fields that name a picture in both files."""
    place: Fields = {"id": line_id}
    return place | ({"index": index} if index else {}) | ({"sweep": dict(sweep)} if sweep else {})


def key_of(order: ImageOrder, digest: str) -> str:
    """Return the hash of all that determines a picture's file, but its backend, which the receipt names."""
    (params,), encoding = order.pictures, order.encoding
    facts = [
        {one.name: getattr(params, one.name) for one in fields(params) if one.name not in ("edit", "references")},
        order.model,
        digest,
        order.delivery.strict,
        [encoding.output_format, encoding.compression, encoding.metadata],
    ]
    if params.edit_digest is not None:
        facts.append([params.edit_digest, None if params.edit is None else params.edit.strength])
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def finished_entries(storage: Storage) -> Iterator[Entry]:
    """Yield the entries of the finished chunks of this run, in order."""
    for name in storage.names(PARTS):
        for line in storage.lines(name):
            yield Entry(**json.loads(line))


class Known:
    """Finished pictures of earlier runs, in a temporary database on the disk: there may be millions."""

    def __init__(self, storage: Storage) -> None:
        self._database = sqlite3.connect(
            "", isolation_level=None, check_same_thread=False
        )  # SQLite deletes it, whatever happens
        self._database.execute("PRAGMA journal_mode=OFF")
        self._database.execute("CREATE TABLE entries (key BLOB PRIMARY KEY, line BLOB) WITHOUT ROWID")
        self._database.execute("CREATE TABLE taken (kind INTEGER, name BLOB, PRIMARY KEY (kind, name)) WITHOUT ROWID")
        self._database.execute("BEGIN")
        self._keep(_entries_of_manifest(storage))
        for name in [DONE, *storage.names(PARTS), *storage.names(JOURNALS)]:
            self._keep(entries_of(storage.lines(name)))

    def _keep(self, entries: Iterable[Entry]) -> None:
        rows = ((_digest(entry.record, entry.record["key"]), entry.to_line()) for entry in entries)
        self._database.executemany("INSERT OR REPLACE INTO entries VALUES (?, ?)", rows)

    def find(self, place: Fields, key: str) -> Entry | None:
        """Return the entry of a picture that was finished before."""
        found = self._database.execute("SELECT line FROM entries WHERE key = ?", (_digest(place, key),)).fetchone()
        return None if found is None else Entry(**json.loads(found[0]))

    def lines(self) -> Iterator[bytes]:
        """Yield all entries as lines."""
        return (line for (line,) in self._database.execute("SELECT line FROM entries"))

    def take(self, kind: int, name: str) -> bool:
        """Take a name, of an id or a file. Return whether it was free."""
        row = (kind, hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:16])
        return self._database.execute("INSERT OR IGNORE INTO taken VALUES (?, ?)", row).rowcount == 1


def gather(storage: Storage) -> None:
    """Put what an unfinished run left into one file, `DONE`. A second call, or one after a kill, changes nothing."""
    if storage.names(PARTS) or storage.names(JOURNALS):
        storage.put(DONE, Known(storage).lines())
        storage.drop(PARTS)
        storage.drop(JOURNALS)


def _digest(place: Fields, key: str) -> bytes:
    return hashlib.sha256(
        json.dumps([place["id"], place.get("index"), place.get("sweep"), key], sort_keys=True).encode()
    ).digest()[:20]


def _entries_of_manifest(storage: Storage) -> Iterator[Entry]:
    """Yield the finished pictures of a finished run. Times that were lost or belong to another run are left out."""
    for record, times in zip_longest(storage.lines(MANIFEST), storage.lines(TIMES)):
        if record is not None:
            line = b'{"record": %s, "times": %s}' % (record.strip(), (times or b"{}").strip())
            for entry in entries_of([line]):
                is_same = entry.times.get("id") == entry.record["id"]
                yield entry if is_same else Entry(entry.record, {"id": entry.record["id"]})


def entries_of(lines: Iterable[bytes]) -> Iterator[Entry]:
    """Yield the finished pictures of lines. Lines that a kill tore, or that are not ours, are left out."""
    for line in lines:
        try:
            entry = Entry(**json.loads(line))
            if entry.is_completed and entry.record.keys() >= FACTS | {"id"} and entry.record["receipt"]["backend"]:
                yield entry
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
