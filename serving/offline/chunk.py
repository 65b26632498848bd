"""Makes the pictures and clips of a chunk with any `Images`, in this process or in a worker of Ray."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

from serving.errors import APIError, from_exception, made_when_free
from serving.images.interface import Images
from serving.offline.outputs import Output
from serving.offline.plan import Chunk, Unit
from serving.offline.records import FACTS, JOURNALS, PARTS, Entry, entries_of
from serving.offline.storage import Storage
from serving.schema.answers import ImageAnswer
from serving.schema.order import ImageOrder

TRIES = 2
"""Times that a picture is tried whose request is not at fault."""
MAX_REPORTED = 20
"""Most failures of a chunk that are reported while the run goes on. All are in the manifest."""
MAX_CLIPS = 8
"""Most clips in the engine at once: each has latents and frames of several pictures."""
SMALL_BYTES = 2**17
"""Largest local file that is written on the event loop; a thread would take longer."""

Outcome = Literal["made", "kept", "failed"]
Report = Callable[[Outcome], None]
"""Called on the event loop when a picture is made, was made by an earlier run, or failed."""


@dataclass
class ChunkResult:
    """What became of the pictures of a chunk."""

    number: int
    share: float | None
    """Share of the input that is read after it."""
    counts: dict[Outcome, int] = field(default_factory=lambda: {"made": 0, "kept": 0, "failed": 0})
    failures: list[str] = field(default_factory=list)
    """The first ones, in words."""


class Room:
    """Bound on the orders in the engine at once."""

    def __init__(self, num_in_flight: int) -> None:
        self._pictures = asyncio.Semaphore(num_in_flight)
        self._clips = asyncio.Semaphore(min(num_in_flight, MAX_CLIPS))

    def of(self, order: ImageOrder) -> asyncio.Semaphore:
        """Return the semaphore that an order must hold."""
        return self._pictures if order.pictures[0].frames is None else self._clips


class ChunkRenderer:
    """Makes chunks. Several may be made at once; their pictures share the engine's calls."""

    def __init__(
        self,
        images: Images,
        storage: Storage,
        output: Output,
        num_in_flight: int,
        report: Report = lambda outcome: None,
    ) -> None:
        """
        Args:
            num_in_flight: most pictures in the engine at once; of clips at most `MAX_CLIPS`.
        """
        self._images = images
        self._storage = storage
        self._output = output
        self._room = Room(num_in_flight)
        self._report = report
        self._backends = {card.id: card.backend for card in images.models()}

    async def render(self, chunk: Chunk) -> ChunkResult:
        """Make what is missing of a chunk and write its entries.

        Raises:
            OSError: the output cannot be written.
            RuntimeError: the engine has stopped.
        """
        result = ChunkResult(chunk.number, chunk.share)
        chunk = await asyncio.to_thread(self._with_journal, chunk)
        is_sealed = all(map(self._may_be_kept, chunk.units)) and await asyncio.to_thread(self._output.is_sealed, chunk)
        entries: dict[int, Entry] = {}

        def note(position: int, entry: Entry, outcome: Outcome) -> None:
            entries[position] = entry
            result.counts[outcome] += 1
            self._report(outcome)
            if outcome == "failed" and len(result.failures) < MAX_REPORTED:
                result.failures.append(_in_words(chunk.units[position], entry))

        async def make(position: int, unit: Unit, order: ImageOrder, room: asyncio.Semaphore) -> None:
            try:
                entry = await self._made(chunk, unit, order)
            finally:
                room.release()
            if journal is not None and entry.is_completed:
                journal.write(entry.to_line())
            note(position, entry, "made" if entry.is_completed else "failed")

        with self._journal(chunk) as journal:
            try:
                async with asyncio.TaskGroup() as tasks:
                    for position, unit in enumerate(chunk.units):
                        if unit.order is None:
                            note(position, _failed(unit), "failed")
                        elif (kept := await self._kept(chunk, unit, is_sealed)) is not None:
                            note(position, kept, "kept")
                        else:
                            room = self._room.of(unit.order)
                            await room.acquire()
                            tasks.create_task(make(position, unit, unit.order, room))
            except ExceptionGroup as group:
                raise group.exceptions[0] from None
            await asyncio.to_thread(self._end, chunk, [entries[n] for n in range(len(chunk.units))], is_sealed)
        return result

    def _end(self, chunk: Chunk, entries: list[Entry], is_sealed: bool) -> None:
        if not is_sealed:
            entries = self._output.seal(chunk, entries)
        self._storage.put(f"{PARTS}/{chunk.number:08d}.jsonl", (entry.to_line() for entry in entries))
        self._output.tidy(chunk)

    def _with_journal(self, chunk: Chunk) -> Chunk:
        """Return the chunk with the pictures that a lost worker of this run had finished."""
        entries = entries_of(self._storage.lines(_journal_of(chunk)))
        finished = {(entry.record.get("member", entry.record["file"]), entry.record["key"]): entry for entry in entries}
        units = (replace(unit, known=finished.get((unit.name, unit.key), unit.known)) for unit in chunk.units)
        return replace(chunk, units=tuple(units))

    @contextlib.contextmanager
    def _journal(self, chunk: Chunk) -> Iterator[io.FileIO | None]:
        """Open the file that tells a later run, or another worker, what this one finished before it was killed."""
        stream = self._storage.append_to(_journal_of(chunk))
        with stream or contextlib.nullcontext():
            yield stream

    def _may_be_kept(self, unit: Unit) -> bool:
        """Whether an earlier run made this very picture. Another backend would have given it other bits."""
        if unit.order is None:
            return True
        backend = self._backends.get(unit.order.model)
        return unit.known is not None and unit.known.record["receipt"]["backend"] == backend

    async def _kept(self, chunk: Chunk, unit: Unit, is_sealed: bool) -> Entry | None:
        """Return the entry of a picture that an earlier run made, if its bytes are still there."""
        if unit.known is None or not self._may_be_kept(unit):
            return None
        if is_sealed:
            return unit.known
        record, place = unit.known.record, self._output.place(chunk, unit)
        content = await asyncio.to_thread(self._output.load, record, unit)
        if content is None or hashlib.sha256(content).hexdigest() != record["sha256"]:
            return None
        facts = {name: value for name, value in record.items() if name in FACTS}
        return Entry(unit.base() | {"status": "completed"} | place | facts, unit.known.times)

    async def _made(self, chunk: Chunk, unit: Unit, order: ImageOrder) -> Entry:
        """Make one picture and save it. A failure is an entry too."""
        for tries_left in reversed(range(TRIES)):
            try:
                answer = await made_when_free(lambda: self._generated(order))
            except Exception as error:
                failure = from_exception(error)
                if not self._images.is_healthy:
                    raise
                if failure.status < 500 or failure.headers.get("x-should-retry") == "false" or not tries_left:
                    return _failed(unit, failure)
            else:
                return await self._saved(chunk, unit, answer)
        raise AssertionError("the last try returns")

    async def _generated(self, order: ImageOrder) -> ImageAnswer:
        if not self._images.is_healthy:  # a stopped engine would be busy for ever
            raise RuntimeError("the engine has stopped; start the run again, it continues")
        return await self._images.generate(order)

    async def _saved(self, chunk: Chunk, unit: Unit, answer: ImageAnswer) -> Entry:
        (image,) = answer.images
        facts = {
            "bytes": len(image.content),
            "sha256": hashlib.sha256(image.content).hexdigest(),
            "seed": image.seed,
            "num_inference_steps": image.num_inference_steps,
            "model": answer.model,
            "key": unit.key,
            "receipt": asdict(image.receipt),
            "warnings": answer.warnings,
        }
        assert facts.keys() == FACTS
        if self._storage.is_local and len(image.content) <= SMALL_BYTES:
            self._output.save(unit, image.content)
        else:
            await asyncio.to_thread(self._output.save, unit, image.content)
        record = unit.base() | {"status": "completed"} | self._output.place(chunk, unit) | facts
        return Entry(record, unit.place | {"finished_at": round(time.time(), 3)} | asdict(answer.timings))


def _journal_of(chunk: Chunk) -> str:
    return f"{JOURNALS}/{chunk.number:08d}.jsonl"


def _failed(unit: Unit, failure: APIError | None = None) -> Entry:
    error = failure or unit.failure
    assert error is not None
    return Entry(unit.base() | {"status": "failed"} | error.to_body(), unit.place)


def _in_words(unit: Unit, entry: Entry) -> str:
    where = f"{unit.source} line {unit.line}" if unit.source else f"line {unit.line}"
    return f"{where}: {entry.record['error']['message']}"
