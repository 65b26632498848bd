"""Sampling from a given picture, in place of pure noise: a later start in the step table, and a mask.

The latents of a sample at noise level (alpha, sigma) are alpha x_0 + sigma noise. So those of the given picture x_0 and
the noise of the seed are where a step can start. With a mask the sample gets them back after each step, where the
picture has to stay.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tdm_runtime.sampling.step_table import StepTable


@dataclass(frozen=True)
class KnownPicture:
    """The given picture of one sample."""

    latents: Tensor
    """x_0, [C, H, W]."""
    noise: Tensor
    """Unit normal noise of the seed, same shape."""
    kept: Tensor | None = None
    """[1, H, W], 1 where the picture stays; None where all of it may change."""
    is_start: bool = True
    """Whether sampling starts from the picture. Otherwise it starts from noise, and the picture only stays where it
    is kept."""

    def start(self, table: StepTable) -> Tensor:
        """Return the latents that the first step of a table takes."""
        return (
            self._at(float(table.alphas[0]), float(table.sigmas[0]))
            if self.is_start
            else (table.initial_scale * self.noise)
        )

    def after_step(self, latents: Tensor, table: StepTable, step_index: int) -> Tensor:
        """Return the latents after a step, with the given picture where it is kept."""
        if self.kept is None:
            return latents
        following = step_index + 1
        if following < table.num_inference_steps:
            known = self._at(float(table.alphas[following]), float(table.sigmas[following]))
        else:
            known = self.latents
        return self.kept * known + (1.0 - self.kept) * latents

    def _at(self, alpha: float, sigma: float) -> Tensor:
        return alpha * self.latents + sigma * self.noise
