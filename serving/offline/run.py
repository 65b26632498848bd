"""A run in this process, and what every run begins and ends with."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass

from serving.images.interface import Images
from serving.offline.chunk import ChunkRenderer, ChunkResult
from serving.offline.grid import contact_sheet
from serving.offline.outputs import OUTPUTS, Output, OutputKind
from serving.offline.plan import GRID, Chunk, PlanOptions
from serving.offline.progress import Progress
from serving.offline.records import MANIFEST, TIMES, finished_entries, to_line
from serving.offline.storage import WORK, Storage

LOCAL = "local"
"""Address of a Ray cluster that is started on this machine, for this run."""
OPEN_CHUNKS = 3
"""Chunks in work at once, so that the engine has full batches while one of them ends."""


@dataclass(frozen=True)
class RunOptions:
    """What a run is asked to do."""

    plan: PlanOptions
    url: str
    """Output folder."""
    kind: OutputKind = "files"
    grid: bool = False
    """Whether to write a contact sheet."""


@dataclass(frozen=True)
class RayOptions:
    """Where a run finds its workers."""

    address: str
    """Address of a Ray cluster, or `LOCAL`."""
    workers: int = 1
    """Number of engines."""
    gpus_per_worker: float = 0.0


def open_output(options: RunOptions) -> tuple[Storage, Output]:
    """Return the output folder and its form."""
    storage = Storage(options.url)
    return storage, OUTPUTS[options.kind](storage)


async def render_here(
    chunks: Iterator[Chunk], images: Images, options: RunOptions, num_in_flight: int, progress: Progress
) -> None:
    """Make all chunks with the engine of this process. The input is read in a thread, a chunk ahead.

    Raises:
        OSError, ValueError: the input cannot be read or the output not be written.
        RuntimeError: the engine has stopped.
    """
    renderer = ChunkRenderer(images, *open_output(options), num_in_flight, progress.add)
    making: set[asyncio.Task[ChunkResult]] = set()
    num_units = 0
    try:
        while (chunk := await asyncio.to_thread(next, chunks, None)) is not None:
            num_units += len(chunk.units)
            progress.expect(num_units, chunk.share)
            while len(making) >= OPEN_CHUNKS:
                making = await _collect(making, progress)
            making.add(asyncio.create_task(renderer.render(chunk)))
        while making:
            making = await _collect(making, progress)
    finally:
        for task in making:
            task.cancel()
        await asyncio.gather(*making, return_exceptions=True)


async def _collect(making: set[asyncio.Task[ChunkResult]], progress: Progress) -> set[asyncio.Task[ChunkResult]]:
    done, left = await asyncio.wait(making, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        progress.fail(task.result().failures)
    return left


def finish(options: RunOptions) -> None:
    """Write the manifest in the order of the input, and delete what only the run needed. Can be repeated.

    Raises:
        OSError: the output cannot be written.
    """
    storage, output = open_output(options)
    if options.grid and (sheet := contact_sheet(finished_entries(storage), output)) is not None:
        storage.put(f"{GRID}.png", sheet)
    storage.put(TIMES, (to_line(entry.times) for entry in finished_entries(storage)))
    storage.put(MANIFEST, (to_line(entry.record) for entry in finished_entries(storage)))
    storage.drop(WORK)
