"""Noise schedules: how much signal and noise a timestep holds. Pure float64 numpy.

Everywhere x_t = alpha_t * x_0 + sigma_t * noise. Diffusion and TrigFlow schedules have alpha^2 + sigma^2 = 1
(variance preserving), flow schedules alpha + sigma = 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from tdm_runtime.errors import RecipeError

Array = NDArray[np.float64]
BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2"]
MAX_TRAIN_TIMESTEPS = 100_000


@dataclass(frozen=True)
class NoiseLevels:
    """Signal and noise of a row of timesteps."""

    alphas: Array
    """Signal scale, in [0, 1]."""
    sigmas: Array
    """Noise scale, in [0, 1]."""


@dataclass(frozen=True)
class DiffusionSchedule:
    """A variance-preserving schedule given by its betas."""

    beta_schedule: BetaSchedule = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    num_train_timesteps: int = 1000
    rescale_zero_terminal_snr: bool = False
    """Rescale so that the last timestep is pure noise (Lin et al. 2024, "Common Diffusion Noise Schedules...")."""
    min_alpha_cumprod: float = 0.0
    """Squared signal never falls below this. diffusers' Euler and DPM-Solver++ keep 2**-24 after the rescale."""
    snr_shift_scale: float = 1.0
    """Divides the signal-to-noise ratio of every timestep, before the rescale. CogVideoX-2b has 3, CogVideoX-5b 1."""

    def __post_init__(self) -> None:
        kinds = get_args(BetaSchedule)
        _require("beta_schedule", self.beta_schedule, self.beta_schedule in kinds, f"one of {', '.join(kinds)}")
        _require("beta_start", self.beta_start, _is_number(self.beta_start) and 0 < self.beta_start < 1, "in (0, 1)")
        ends = _is_number(self.beta_end) and self.beta_start <= self.beta_end < 1
        _require("beta_end", self.beta_end, ends, f"in [beta_start, 1), beta_start is {self.beta_start}")
        _require_train_timesteps(self.num_train_timesteps)
        rescale, floor = self.rescale_zero_terminal_snr, self.min_alpha_cumprod
        _require("rescale_zero_terminal_snr", rescale, isinstance(rescale, bool), "true or false")
        _require("min_alpha_cumprod", floor, _is_number(floor) and 0 <= floor < 1, "in [0, 1)")
        scale = self.snr_shift_scale
        _require("snr_shift_scale", scale, _is_number(scale) and 0 < scale <= 1000, "in (0, 1000]")

    @property
    def max_timestep(self) -> int:
        """The noisiest timestep."""
        return self.num_train_timesteps - 1

    @property
    def alphas_cumprod(self) -> Array:
        """Squared signal scale per timestep, shape [T]."""
        alphas_cumprod = np.cumprod(1.0 - self._betas())
        if self.snr_shift_scale != 1.0:
            scale = self.snr_shift_scale
            alphas_cumprod = alphas_cumprod / (scale + (1.0 - scale) * alphas_cumprod)
        if self.rescale_zero_terminal_snr:
            root = np.sqrt(alphas_cumprod)
            root = (root - root[-1]) * root[0] / (root[0] - root[-1])
            alphas_cumprod = root**2
        return alphas_cumprod.clip(min=self.min_alpha_cumprod)

    def levels(self, timesteps: Array) -> NoiseLevels:
        """Noise levels at possibly fractional timesteps; below 0 is the clean end, alpha 1 and sigma 0.

        Between two whole timesteps the ratio sigma/alpha is interpolated linearly, as k-diffusion does.
        """
        alphas_cumprod = self.alphas_cumprod
        whole = np.equal(timesteps, np.round(timesteps))
        nearest = alphas_cumprod[np.clip(np.round(timesteps), 0, None).astype(int)]
        if np.all(whole):
            squared = nearest
        else:
            with np.errstate(divide="ignore"):  # pure noise: the ratio is infinite
                ratios = np.sqrt((1.0 - alphas_cumprod) / alphas_cumprod)
            between = np.interp(timesteps, np.arange(self.num_train_timesteps), ratios)
            squared = np.where(whole, nearest, 1.0 / (between**2 + 1.0))
        squared = np.where(timesteps < 0, 1.0, squared)
        return NoiseLevels(np.sqrt(squared), np.sqrt(1.0 - squared))

    def levels_at(self, sigmas: Array) -> NoiseLevels:
        """Noise levels at ratios of noise to signal, which diffusers' Euler and DPM-Solver++ call sigmas."""
        alphas = 1.0 / np.sqrt(sigmas**2 + 1.0)
        return NoiseLevels(alphas, sigmas * alphas)

    def _betas(self) -> Array:
        steps = self.num_train_timesteps
        if self.beta_schedule == "linear":
            return np.linspace(self.beta_start, self.beta_end, steps)
        if self.beta_schedule == "scaled_linear":
            return np.linspace(self.beta_start**0.5, self.beta_end**0.5, steps) ** 2
        time = np.arange(steps + 1) / steps  # squaredcos_cap_v2 (Nichol and Dhariwal 2021, eq. 17)
        bar = np.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
        betas: Array = np.minimum(1.0 - bar[1:] / bar[:-1], 0.999)
        return betas


@dataclass(frozen=True)
class FlowSchedule:
    """A rectified-flow schedule, x_t = (1 - sigma) x_0 + sigma noise, timestep = sigma * T."""

    shift: float = 1.0
    """Static shift of sigma: shift * s / (1 + (shift - 1) * s)."""
    num_train_timesteps: int = 1000

    def __post_init__(self) -> None:
        _require("shift", self.shift, _is_number(self.shift) and 0 < self.shift <= 1000, "in (0, 1000]")
        _require_train_timesteps(self.num_train_timesteps)

    @property
    def max_timestep(self) -> int:
        """The noisiest timestep."""
        return self.num_train_timesteps

    def shifted(self, sigmas: Array) -> Array:
        """Apply the shift to unshifted sigmas in [0, 1]."""
        return self.shift * sigmas / (1.0 + (self.shift - 1.0) * sigmas)

    def unshifted(self, sigmas: Array) -> Array:
        """Undo `shifted`."""
        return sigmas / (self.shift - (self.shift - 1.0) * sigmas)

    def levels(self, timesteps: Array) -> NoiseLevels:
        """Noise levels at timesteps in [0, T]; they are sigma * T, so already shifted."""
        return self.levels_at(np.clip(timesteps / self.num_train_timesteps, 0.0, 1.0))

    def levels_at(self, sigmas: Array) -> NoiseLevels:
        """Noise levels at sigmas in [0, 1].

        Raises:
            RecipeError: a sigma is above 1.
        """
        if np.any(sigmas > 1.0):
            raise RecipeError(f"sigmas of a flow schedule are at most 1, got {sigmas.tolist()}")
        return NoiseLevels(1.0 - sigmas, sigmas)


@dataclass(frozen=True)
class TrigFlowSchedule:
    """TrigFlow (Lu and Song 2024, "Simplifying, Stabilizing and Scaling...", eq. 5): x_t = cos(t) x_0 + sin(t) noise.

    Timesteps are angles. Latents are in units of the data's standard deviation, so that unit noise starts a sampler.
    """

    @property
    def max_timestep(self) -> float:
        """The noisiest timestep: pi / 2 as SANA-Sprint rounds it."""
        return 1.5708

    def levels(self, timesteps: Array) -> NoiseLevels:
        """Noise levels at angles in [0, pi / 2]."""
        return NoiseLevels(np.cos(timesteps), np.sin(timesteps))

    def levels_at(self, sigmas: Array) -> NoiseLevels:
        """Noise levels at angles, as `levels`: TrigFlow counts both by the angle."""
        return self.levels(sigmas)


NoiseSchedule = DiffusionSchedule | FlowSchedule | TrigFlowSchedule
TeacherSchedule = DiffusionSchedule | FlowSchedule
"""Schedules of the teachers that training starts from."""
Spacing = Literal["linspace", "leading", "trailing"]


def spaced_timesteps(
    spacing: Spacing, num_inference_steps: int, num_train_timesteps: int = 1000, steps_offset: int = 0
) -> Array:
    """Return K timesteps, falling, as diffusion models space them (Lin et al. 2024, table 2).

    linspace covers both ends and may be fractional; leading starts below T; trailing ends above 0.
    """
    k, total = num_inference_steps, num_train_timesteps
    if spacing == "linspace":
        return np.linspace(0, total - 1, k)[::-1].copy()
    if spacing == "leading":
        return np.arange(k, dtype=np.float64)[::-1] * (total // k) + steps_offset
    if spacing == "trailing":
        return np.round(np.arange(total, 0, -total / k))[:k] - 1.0
    raise RecipeError(f"timestep spacing {spacing!r} is unknown; use linspace, leading or trailing")


def flow_timesteps(schedule: FlowSchedule, num_inference_steps: int) -> Array:
    """Return K timesteps, falling from T, evenly spaced before the shift; the last step ends at 0."""
    sigmas = 1.0 - np.arange(num_inference_steps) / num_inference_steps
    return schedule.shifted(sigmas) * schedule.num_train_timesteps


def as_array(values: Sequence[float]) -> Array:
    """Return a float64 array."""
    return np.asarray(values, dtype=np.float64)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _require(name: str, value: object, is_allowed: bool, allowed: str) -> None:
    if not is_allowed:
        raise RecipeError(f"{name} is {value!r}; it must be {allowed}")


def _require_train_timesteps(value: object) -> None:
    is_allowed = isinstance(value, int) and not isinstance(value, bool) and 2 <= value <= MAX_TRAIN_TIMESTEPS
    _require("num_train_timesteps", value, is_allowed, f"a whole number from 2 to {MAX_TRAIN_TIMESTEPS}")
