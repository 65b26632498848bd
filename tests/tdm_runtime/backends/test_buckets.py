"""Batches cut into calls of powers of two give the result of one call."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tdm_runtime.backends.buckets import MAX_BATCH_BUCKET, in_buckets, split_batch

COUNTS = st.integers(1, 3 * MAX_BATCH_BUCKET)
PADDINGS = st.floats(0, 0.5)


@given(COUNTS, PADDINGS)
def test_every_sample_is_in_exactly_one_call(count: int, max_padding: float) -> None:
    assert sum(samples for samples, _ in split_batch(count, max_padding)) == count


@given(COUNTS, PADDINGS)
def test_sizes_are_powers_of_two_up_to_the_largest(count: int, max_padding: float) -> None:
    for samples, size in split_batch(count, max_padding):
        assert 1 <= samples <= size <= MAX_BATCH_BUCKET
        assert size & (size - 1) == 0


@given(COUNTS, PADDINGS)
def test_padding_stays_within_its_share(count: int, max_padding: float) -> None:
    for samples, size in split_batch(count, max_padding):
        assert size - samples <= max_padding * size


@given(st.integers(1, MAX_BATCH_BUCKET))
def test_padding_of_one_half_needs_one_call(count: int) -> None:
    assert len(split_batch(count, 0.5)) == 1


@given(COUNTS)
def test_without_padding_call_sizes_are_the_binary_digits_of_the_count(count: int) -> None:
    sizes = [size for _, size in split_batch(count, 0.0)]
    rest = sum(size for size in sizes if size < MAX_BATCH_BUCKET)
    assert all(samples == size for samples, size in split_batch(count, 0.0))
    assert sizes == sorted(sizes, reverse=True)
    assert len([size for size in sizes if size < MAX_BATCH_BUCKET]) == rest.bit_count()


@given(COUNTS, PADDINGS)
def test_the_result_equals_one_call(count: int, max_padding: float) -> None:
    latents = torch.arange(count * 6, dtype=torch.float32).view(count, 2, 3)
    timesteps = torch.arange(count, dtype=torch.float32)
    sizes = []

    def run(inputs: Sequence[Tensor]) -> Tensor:
        assert len(inputs[0]) == len(inputs[1])
        sizes.append(len(inputs[0]))
        return inputs[0] * 2 + inputs[1][:, None, None]

    result = in_buckets(run, [latents, timesteps], max_padding)
    assert torch.equal(result, latents * 2 + timesteps[:, None, None])
    assert sizes == [size for _, size in split_batch(count, max_padding)]


@pytest.mark.parametrize("count", [3, 5, 7])
def test_padding_repeats_a_real_sample(count: int) -> None:
    seen = []

    def run(inputs: Sequence[Tensor]) -> Tensor:
        seen.append(inputs[0])
        return inputs[0]

    latents = torch.randn(count, 2)
    in_buckets(run, [latents], 0.5)
    (padded,) = seen
    assert torch.equal(padded[count:], latents[-1:].expand(len(padded) - count, -1))


@pytest.mark.parametrize("count", [1, 8, 64])
def test_a_full_bucket_is_not_copied(count: int) -> None:
    latents = torch.randn(count, 2)
    in_buckets(lambda inputs: inputs[0], [latents], 0.5).add_(1)
    result = in_buckets(lambda inputs: inputs[0], [latents], 0.5)
    assert result.data_ptr() == latents.data_ptr()
