"""Noise of a seed, and its circle of angles: normal at every angle, and bit-equal to the plain noise at 0."""

from __future__ import annotations

import math

import pytest
import torch

from tdm_runtime.sampling.noise import SeedNoise, initial_noise

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


def test_the_noise_of_a_step_is_the_next_draw_of_the_seeds_generator() -> None:
    generator = torch.Generator().manual_seed(7)
    draws = [torch.randn(SHAPE, generator=generator) for _ in range(5)]
    noise = SeedNoise(7, SHAPE)
    assert torch.equal(noise.initial(), draws[0])
    for step_index in (0, 1, 3, 3, 2, 0):  # in order, skipped, again and back
        assert torch.equal(noise.of_step(step_index), draws[step_index + 1])
    assert torch.equal(noise.initial(), draws[0])


def test_the_noise_of_a_batched_shape_is_that_of_a_sample() -> None:
    """Stock pipelines draw [1, C, H, W], the engine [C, H, W]."""
    assert torch.equal(SeedNoise(7, (1, *SHAPE)).of_step(1)[0], SeedNoise(7, SHAPE).of_step(1))


@pytest.mark.parametrize("angle", [0.0, 0.5, math.pi / 2, 4.0])
def test_all_noises_of_a_request_are_unit_normal_and_independent_at_every_angle(angle: float) -> None:
    noise = SeedNoise(7, SHAPE, angle)
    drawn = torch.stack([noise.initial(), *(noise.of_step(j) for j in range(3))]).flatten(1)
    torch.testing.assert_close(drawn @ drawn.T / drawn.shape[1], torch.eye(4), atol=0.04, rtol=0)


def test_noise_of_clips_may_be_drawn_frame_by_frame_and_twice_a_step() -> None:
    """CogVideoX draws [F, C, H, W], and its DPM solver draws twice in each step but the first."""
    channels, frames, height, width = 4, 3, 6, 5
    generator = torch.Generator().manual_seed(7)
    draws = [torch.randn(frames, channels, height, width, generator=generator).transpose(0, 1) for _ in range(6)]
    noise = SeedNoise(7, (channels, frames, height, width), frames_first=True, draws_a_step=2)
    assert torch.equal(noise.initial(), draws[0])
    for step_index in (0, 1, 2, 0):
        assert torch.equal(noise.of_step(step_index), draws[2 * step_index + 1])


def test_step_noises_turn_back_to_themselves_on_the_circle() -> None:
    for step_index in range(3):
        near = SeedNoise(7, SHAPE, 1e-6).of_step(step_index)
        torch.testing.assert_close(near, SeedNoise(7, SHAPE).of_step(step_index), atol=1e-4, rtol=0)
