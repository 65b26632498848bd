"""Batch sizes for backends that compile one program for each shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

MAX_BATCH_BUCKET = 64


def split_batch(count: int, max_padding: float, max_size: int = MAX_BATCH_BUCKET) -> list[tuple[int, int]]:
    """Cut a batch into calls whose sizes are powers of two.

    Args:
        max_padding: share of a call that may be padding, in [0, 0.5]. Where a call's time grows with its size, as on
            a CPU, little; where it hardly does, as on a GPU, 0.5: then everything is one call.
        max_size: of a call, a power of two.

    Returns:
        (samples, size) of each call: size - samples rows are padding.
    """
    calls = []
    while count:
        size = min(max_size, 1 << (count - 1).bit_length())
        if size - count > max_padding * size:
            size //= 2
        calls.append((min(count, size), size))
        count -= calls[-1][0]
    return calls


def in_buckets(
    run: Callable[[Sequence[Tensor]], Tensor],
    inputs: Sequence[Tensor],
    max_padding: float,
    max_size: int = MAX_BATCH_BUCKET,
) -> Tensor:
    """Call `run` with batches of power-of-two sizes and join the results without the padding."""
    outputs = []
    start = 0
    for samples, size in split_batch(len(inputs[0]), max_padding, max_size):
        part = [tensor[start : start + samples] for tensor in inputs]
        outputs.append(run([_padded(tensor, size) for tensor in part])[:samples])
        start += samples
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _padded(tensor: Tensor, size: int) -> Tensor:
    """Repeat the last row up to `size`: real values, so that padding overflows nowhere."""
    missing = size - len(tensor)
    return tensor if missing == 0 else torch.cat([tensor, tensor[-1:].expand(missing, *tensor.shape[1:])])
