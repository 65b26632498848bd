"""Estimate of a run in time and bytes: all lines are read and checked, and a sample of the pictures is made."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from serving.images.interface import Images
from serving.offline.chunk import Room
from serving.offline.plan import Chunk, Unit
from serving.schema.order import ImageOrder

SAMPLE = 64
"""Most pictures of the sample. Each picture of the run is in it with the same probability."""
SAMPLE_S = 10.0
"""Time after which no further picture of the sample is begun, in seconds."""


@dataclass
class Estimate:
    """What a run would do."""

    what: str = "pictures"
    """The plural of what is made."""
    num_pictures: int = 0
    """Pictures to make."""
    num_kept: int = 0
    """Pictures that an earlier run recorded."""
    num_failed: int = 0
    """Lines and pictures that cannot be made."""
    seconds: float = 0.0
    num_bytes: int = 0
    """Bytes of the pictures to make."""
    sample: list[ImageOrder] = field(default_factory=list, repr=False)

    def __str__(self) -> str:
        kept = f", {self.num_kept} of an earlier run are kept" if self.num_kept else ""
        failed = f", {self.num_failed} cannot be made" if self.num_failed else ""
        return (
            f"{self.num_pictures} {self.what} to make{kept}{failed}; about {_in_words(self.seconds)} on this machine "
            f"and {self.num_bytes / 1e6:.1f} MB"
        )


def count(chunks: Iterator[Chunk], what: str) -> Estimate:
    """Read and check all lines, and draw the sample, the same at each call."""
    estimate, draw = Estimate(what), random.Random(0)
    for chunk in chunks:
        for unit in chunk.units:
            if unit.order is None:
                estimate.num_failed += 1
            elif unit.known is not None:
                estimate.num_kept += 1
            else:
                _sample(estimate, unit, draw)
    draw.shuffle(estimate.sample)
    return estimate


def _sample(estimate: Estimate, unit: Unit, draw: random.Random) -> None:
    assert unit.order is not None
    estimate.num_pictures += 1
    if len(estimate.sample) < SAMPLE:
        estimate.sample.append(unit.order)
    elif (place := draw.randrange(estimate.num_pictures)) < SAMPLE:
        estimate.sample[place] = unit.order


async def measure(estimate: Estimate, images: Images, num_in_flight: int) -> None:
    """Make the sample and estimate time and bytes from it."""
    room, began_s = Room(num_in_flight), time.monotonic()
    sizes: list[int] = []

    async def make(order: ImageOrder) -> None:
        async with room.of(order):
            if not sizes or time.monotonic() < began_s + SAMPLE_S:
                try:
                    answer = await images.generate(order)
                except Exception:
                    sizes.append(0)  # its failure takes its time too
                    return
                sizes.append(len(answer.images[0].content))

    await asyncio.gather(*map(make, estimate.sample))
    if sizes:
        factor = estimate.num_pictures / len(sizes)
        estimate.seconds = factor * (time.monotonic() - began_s)
        estimate.num_bytes = round(factor * sum(sizes))


def _in_words(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
