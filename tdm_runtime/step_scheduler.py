"""Which samples take the next step together. Knows no tensors.

Laws (tests/tdm_runtime/test_step_scheduler.py): every sample takes each of its steps exactly once,
a batch never exceeds its capacity or mixes buckets, and the most urgent sample is always in it, so
none starves: urgency is the deadline, then the order of arrival, and every sample has a deadline.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, Protocol, TypeVar


class Schedulable(Protocol):
    """What the scheduler needs to know of a sample."""

    @property
    def bucket(self) -> Hashable:
        """Samples of one bucket fit into one denoiser call: same model, same latent shape."""
        ...

    @property
    def urgency(self) -> tuple[float, int]:
        """(deadline in seconds, order of arrival): unique, the smallest goes first."""
        ...


Item = TypeVar("Item", bound=Schedulable)


class StepScheduler(Generic[Item]):
    """The live samples and the choice among them."""

    def __init__(self, max_batch_size: int) -> None:
        if max_batch_size < 1:
            raise ValueError(f"max_batch_size is {max_batch_size}; a batch holds at least 1 sample")
        self.max_batch_size = max_batch_size
        self._live: dict[tuple[float, int], Item] = {}

    def __len__(self) -> int:
        return len(self._live)

    def add(self, item: Item) -> None:
        """Let a sample join; it may share the very next step."""
        assert item.urgency not in self._live, "urgency must be unique"
        self._live[item.urgency] = item

    def remove(self, item: Item) -> None:
        """Let a finished, failed or cancelled sample leave."""
        del self._live[item.urgency]

    def live(self) -> list[Item]:
        """All samples, most urgent first."""
        return [self._live[urgency] for urgency in sorted(self._live)]

    def schedule(self) -> list[Item]:
        """Return the next batch: the most urgent sample and those of its bucket, in order of urgency."""
        ordered = self.live()
        if not ordered:
            return []
        bucket = ordered[0].bucket
        return [item for item in ordered if item.bucket == bucket][: self.max_batch_size]
