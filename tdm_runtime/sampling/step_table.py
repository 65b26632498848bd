"""A deterministic few-step sampler as a table of numbers.

For a noise schedule, a solver and a list of timesteps everything a solver does is known before
the first request. Row j of the table says

    denoised_j = p_j * x_j + q_j * model_output_j
    x_{j+1}    = a_j * x_j + b_j * denoised_j + c_j * denoised_{j-1}

So samples with different step counts, at different steps, even under different solvers, share one
denoiser call and one fused update. Latents live in the schedule's own coordinates,
x = alpha x_0 + sigma noise, where the denoiser takes x as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from tdm_runtime.errors import RecipeError
from tdm_runtime.sampling.schedule import Array, DiffusionSchedule, FlowSchedule, NoiseLevels, NoiseSchedule

PredictionType = Literal["epsilon", "v_prediction", "flow_prediction", "sample"]
Solver = Literal["ddim", "euler", "dpmsolver++"]
PREDICTION_TYPES: tuple[str, ...] = get_args(PredictionType)
SOLVERS: tuple[str, ...] = get_args(Solver)


@dataclass(frozen=True)
class StepTable:
    """The K rows of one sampler. Each column is a float64 array of shape [K], read-only."""

    timesteps: Array
    """Timesteps that the denoiser receives, falling."""
    p: Array
    """denoised = p * latents + q * model_output."""
    q: Array
    a: Array
    """next latents = a * latents + b * denoised + c * previous denoised."""
    b: Array
    c: Array
    """Zero in row 0, and in every row of a one-step solver."""
    initial_scale: float = 1.0
    """The sampler starts from unit noise times this factor."""

    def __post_init__(self) -> None:
        for name in ("timesteps", "p", "q", "a", "b", "c"):
            column = getattr(self, name)
            if not np.all(np.isfinite(column)):
                raise RecipeError(f"column {name} of the step table is not finite: {column.tolist()}")
            column.setflags(write=False)

    @property
    def num_inference_steps(self) -> int:
        return len(self.timesteps)

    @cached_property
    def rows(self) -> NDArray[np.float32]:
        """[K, 6]: timestep, p, q, a, b, c of each step, as samplers compute with them."""
        return np.stack([self.timesteps, self.p, self.q, self.a, self.b, self.c], axis=1).astype(np.float32)


def build_step_table(
    schedule: NoiseSchedule,
    prediction_type: PredictionType,
    solver: Solver,
    timesteps: Array,
    *,
    next_timesteps: Array | None = None,
    initial_scale: float = 1.0,
) -> StepTable:
    """Compute a table.

    Args:
        timesteps: K timesteps, falling.
        next_timesteps: where each step lands. By default the next timestep, and the clean end
            (any value below 0, or flow time 0) for the last. diffusers' DDIM lands at t - T // K instead.
        initial_scale: see `StepTable.initial_scale`.

    Raises:
        RecipeError: the timesteps do not fall, or solver, prediction and schedule do not fit together.
    """
    if timesteps.ndim != 1 or len(timesteps) == 0 or np.any(np.diff(timesteps) >= 0):
        raise RecipeError(f"timesteps must be a falling list of at least one number, got {timesteps.tolist()}")
    if not np.all((timesteps >= 0) & (timesteps <= schedule.max_timestep)):
        raise RecipeError(f"timesteps leave 0..{schedule.max_timestep}: {timesteps.tolist()}")
    if isinstance(schedule, FlowSchedule) != (prediction_type == "flow_prediction"):
        raise RecipeError(
            f"prediction_type {prediction_type!r} does not fit a {type(schedule).__name__}: "
            "flow_prediction goes with a flow schedule and with nothing else"
        )
    if next_timesteps is None:
        clean_end = -1.0 if isinstance(schedule, DiffusionSchedule) else 0.0
        next_timesteps = np.append(timesteps[1:], clean_end)
    if next_timesteps.shape != timesteps.shape or not np.all(next_timesteps <= timesteps):
        raise RecipeError(
            f"next_timesteps must hold one number for each of {timesteps.tolist()}, not above it; "
            f"got {next_timesteps.tolist()}"
        )
    current, following = schedule.levels(timesteps), schedule.levels(next_timesteps)
    if prediction_type == "epsilon" and np.any(current.alphas == 0):
        raise RecipeError(
            f"prediction_type 'epsilon' is undefined at timestep {timesteps[0]:g}, where the schedule has no signal; "
            "use v_prediction, or a schedule without zero terminal SNR"
        )
    if np.any(current.sigmas == 0):
        raise RecipeError(f"no step can start at timestep {timesteps[-1]:g}, where the schedule has no noise")
    with np.errstate(divide="ignore", invalid="ignore"):
        p, q = denoise_columns(prediction_type, current)
        a, b, c = _solver_columns(solver, current, following)
    return StepTable(timesteps.copy(), p, q, a, b, c, initial_scale)


def denoise_columns(prediction_type: PredictionType, level: NoiseLevels) -> tuple[Array, Array]:
    """p and q: from latents and model output to the denoised estimate of x_0."""
    alpha, sigma = level.alphas, level.sigmas
    if prediction_type == "epsilon":  # x_0 = (x - sigma eps) / alpha
        return 1.0 / alpha, -sigma / alpha
    if prediction_type == "v_prediction":  # v = alpha eps - sigma x_0 (Salimans and Ho 2022)
        return alpha.copy(), -sigma
    if prediction_type == "flow_prediction":  # v = eps - x_0
        return np.ones_like(sigma), -sigma
    if prediction_type == "sample":
        return np.zeros_like(sigma), np.ones_like(sigma)
    raise RecipeError(f"prediction_type {prediction_type!r} is unknown; use one of {', '.join(PREDICTION_TYPES)}")


def _solver_columns(solver: Solver, level: NoiseLevels, following: NoiseLevels) -> tuple[Array, Array, Array]:
    if solver in ("ddim", "euler"):
        # Euler on d(x/alpha)/d(sigma/alpha) is the DDIM step (Song et al. 2021, eq. 12) in other coordinates.
        a = following.sigmas / level.sigmas
        return a, following.alphas - level.alphas * a, np.zeros_like(a)
    if solver == "dpmsolver++":
        return _dpm_solver_columns(level, following)
    raise RecipeError(f"solver {solver!r} is unknown; use one of {', '.join(SOLVERS)}")


def _dpm_solver_columns(level: NoiseLevels, following: NoiseLevels) -> tuple[Array, Array, Array]:
    """DPM-Solver++ 2M (Lu et al. 2022, algorithm 2): second order between, first order at both ends."""
    log_snr = np.log(level.alphas) - np.log(level.sigmas)
    log_snr_next = np.log(following.alphas) - np.log(following.sigmas)
    h = log_snr_next - log_snr
    a = following.sigmas / level.sigmas
    first_order = -following.alphas * np.expm1(-h)
    b, c = first_order.copy(), np.zeros_like(a)
    middle = slice(1, len(a) - 1)
    half_ratio = 0.5 * h[middle] / np.diff(log_snr)[:-1]  # 1 / (2 r), r = h_{j-1} / h_j
    b[middle] = first_order[middle] * (1.0 + half_ratio)
    c[middle] = -first_order[middle] * half_ratio
    return a, b, c
