"""Noise of a seed, and its circle of angles: normal at every angle, and bit-equal to the plain noise at 0."""

from __future__ import annotations

import math

import pytest
import torch

from tdm_runtime.sampling.noise import initial_noise

SHAPE = (4, 64, 64)


def test_angle_zero_is_the_plain_noise_of_the_seed() -> None:
    expected = torch.randn(SHAPE, generator=torch.Generator().manual_seed(7))
    assert torch.equal(initial_noise(7, SHAPE), expected)
    assert torch.equal(initial_noise(7, SHAPE, 0.0), expected)


@pytest.mark.parametrize("angle", [0.0, 0.1, math.pi / 4, math.pi / 2, 3.0, 6.2])
def test_noise_is_unit_normal_at_every_angle(angle: float) -> None:
    """Mean, variance and fourth moment lie within five standard errors of 16384 draws."""
    noise = initial_noise(7, SHAPE, angle).double()
    error = 5 / math.sqrt(noise.numel())
    assert abs(noise.mean()) < error
    assert abs(noise.square().mean() - 1) < math.sqrt(2) * error
    assert abs(noise.pow(4).mean() - 3) < math.sqrt(96) * error


def test_the_circle_closes_and_its_halves_are_opposite() -> None:
    first, opposite = initial_noise(7, SHAPE), initial_noise(7, SHAPE, math.pi)
    torch.testing.assert_close(opposite, -first, atol=1e-5, rtol=0)
    torch.testing.assert_close(initial_noise(7, SHAPE, math.tau - 1e-9), first, atol=1e-5, rtol=0)


def test_the_correlation_of_two_angles_is_the_cosine_of_their_difference() -> None:
    here, there = (initial_noise(7, SHAPE, angle).flatten() for angle in (1.0, 1.5))
    assert torch.corrcoef(torch.stack([here, there]))[0, 1] == pytest.approx(math.cos(0.5), abs=0.05)
