"""Noise of a request: a function of its seed alone, so the same alone and in a batch.

A request's generator draws as stock pipelines draw: first the initial latents, then one noise of the same shape for
each step, in order.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class SeedNoise:
    """Unit normal noise of one seed, float32 on the CPU: d_0, d_1, d_2, ... are the draws of its generator.

    At angle 0 the initial latents are d_0 and the noise of step j is d_{j+1}. A seed has a circle of noises: the angle
    turns the first two draws, so that the initial latents are cos(angle) d_0 + sin(angle) d_1 and the noise of step 0
    is cos(angle) d_1 - sin(angle) d_0. The noise of later steps does not depend on the angle. At every angle all of
    them are unit normal and independent, and pictures at near angles are alike.

    It holds a generator and no tensor. The same noise may be asked for again, as after a call that failed.
    """

    def __init__(
        self,
        seed: int,
        shape: tuple[int, ...],
        angle: float = 0.0,
        *,
        frames_first: bool = False,
        draws_a_step: int = 1,
        first_draw: int = 0,
        step_draw: int = 1,
    ) -> None:
        """
        Args:
            shape: Of each noise.
            angle: In radians.
            frames_first: Whether the generator draws a clip [..., C, F, H, W] as [..., F, C, H, W].
            draws_a_step: Draws of each step, of which the last is used but for step 0, which draws once: the noise of
                step j is d_{draws_a_step j + 1}. CogVideoX's DPM solver draws twice.
        """
        self._seed, self._shape, self._angle = seed, shape, angle
        self._frames_first, self._draws_a_step = frames_first, draws_a_step
        self._first_draw, self._step_draw = first_draw, step_draw
        self._drawn_shape = (*shape[:-4], shape[-3], shape[-4], *shape[-2:]) if frames_first else shape
        self._generator = torch.Generator()
        self._next_draw: int | None = None
        """Number of the draw that the generator makes next; None before it is seeded."""

    def initial(self) -> Tensor:
        """Return the noise that the latents start from."""
        first = self._draw(0)
        if self._angle == 0.0:
            return first
        return math.cos(self._angle) * first + math.sin(self._angle) * self._draw(1)

    def of_step(self, step_index: int) -> Tensor:
        """Return the fresh noise of a step."""
        if step_index > 0 or self._angle == 0.0:
            return self._draw(self._draws_a_step * step_index + self._step_draw)
        first, second = self._draw(0), self._draw(1)
        return math.cos(self._angle) * second - math.sin(self._angle) * first

    def _draw(self, number: int) -> Tensor:
        number += self._first_draw
        if self._next_draw is None or number < self._next_draw:
            self._generator.manual_seed(self._seed)
            self._next_draw = 0
        while True:
            drawn = torch.randn(self._drawn_shape, generator=self._generator, dtype=torch.float32)
            self._next_draw += 1
            if self._next_draw > number:
                return drawn.transpose(-4, -3).contiguous() if self._frames_first else drawn


def initial_noise(seed: int, shape: tuple[int, ...], angle: float = 0.0) -> Tensor:
    """Return the noise that the latents of a request start from; see `SeedNoise`."""
    return SeedNoise(seed, shape, angle).initial()
