"""Training in one process or many, through accelerate: rank, slices of a batch and mean gradients.

Every process draws the same numbers and takes its own slice of the batch, so weights stay equal
without a wrapper around the modules. A wrapper would not work with two adapters on one base.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor


class Processes:
    """This process and the others of the same run (`accelerate launch --num_processes N`)."""

    def __init__(self) -> None:
        self._state = PartialState(cpu=not torch.cuda.is_available())
        self.count: int = self._state.num_processes
        self.rank: int = self._state.process_index
        self.device: torch.device = self._state.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes the log and the checkpoints."""
        return self.rank == 0

    def parts(self, batch_size: int, accumulation: int) -> list[slice]:
        """Return this process's slices of a batch, one for each backward pass.

        Raises:
            ValueError: The batch size is no multiple of processes x accumulation.
        """
        cuts = self.count * accumulation
        if batch_size % cuts:
            raise ValueError(
                f"batch_size {batch_size} cannot be cut into {self.count} processes x {accumulation} accumulated "
                f"parts; take a multiple of {cuts}"
            )
        size = batch_size // cuts
        first = self.rank * accumulation
        return [slice(n * size, (n + 1) * size) for n in range(first, first + accumulation)]

    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace every gradient by its mean over the processes."""
        if self.count == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        mean = reduce(flat, reduction="mean")
        for gradient, part in zip(gradients, mean.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def mean(self, value: float) -> float:
        """Return the mean of a number over the processes."""
        if self.count == 1:
            return value
        return float(reduce(torch.tensor(value, device=self.device), reduction="mean"))

    def wait(self) -> None:
        """Wait until every process has reached this call."""
        self._state.wait_for_everyone()
