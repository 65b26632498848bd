"""A few-step sampler as a table of numbers.

For a noise schedule, a solver and a list of timesteps everything a solver does is known before
the first request. Row j of the table says

    denoised_j = p_j * x_j + q_j * model_output_j
    x_{j+1}    = a_j * x_j + b_j * denoised_j + c_j * denoised_{j-1} + d_j * noise_j + e_j * denoised_{j-2}

noise_j is fresh unit normal noise, a function of the request's seed and j (`sampling.noise`).
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
from tdm_runtime.sampling.schedule import (
    Array,
    DiffusionSchedule,
    FlowSchedule,
    NoiseLevels,
    NoiseSchedule,
    TrigFlowSchedule,
)
from tdm_runtime.sampling.solvers import DIFFUSION_SOLVERS, Solver, boundary_scalings, solver_columns

PredictionType = Literal["epsilon", "v_prediction", "flow_prediction", "sample"]
PREDICTION_TYPES: tuple[str, ...] = get_args(PredictionType)
LCM_TIMESTEP_SCALING = 10.0
"""Default of `timestep_scaling` in LCM's boundary scalings."""
COLUMNS = ("timesteps", "p", "q", "a", "b", "c", "d", "e")


@dataclass(frozen=True)
class StepTable:
    """The K rows of one sampler. Each column is a float64 array of shape [K], read-only."""

    timesteps: Array
    """Timesteps that the denoiser receives; they never rise."""
    p: Array
    """denoised = p * latents + q * model_output."""
    q: Array
    a: Array
    """next latents = a * latents + b * denoised + c * previous denoised + d * noise + e * denoised before that."""
    b: Array
    c: Array
    """Zero in row 0, and in every row of a one-step solver."""
    d: Array
    """Zero in the last row, and in every row of a deterministic solver."""
    e: Array
    """Zero in rows 0 and 1 and the last, and in every row of a solver other than unipc."""
    alphas: Array
    """Share of the picture in the latents that each step starts from: they are alpha x_0 + sigma noise."""
    sigmas: Array
    """Share of the noise in them."""
    initial_scale: float = 1.0
    """The sampler starts from unit noise times this factor."""

    def __post_init__(self) -> None:
        for name in (*COLUMNS, "alphas", "sigmas"):
            column = getattr(self, name)
            if not np.all(np.isfinite(column)):
                raise RecipeError(f"column {name} of the step table is not finite: {column.tolist()}")
            column.setflags(write=False)

    @property
    def num_inference_steps(self) -> int:
        return len(self.timesteps)

    @cached_property
    def rows(self) -> NDArray[np.float32]:
        """[K, 8]: timestep, p, q, a, b, c, d, e of each step, as samplers compute with them."""
        return np.stack([getattr(self, name) for name in COLUMNS], axis=1).astype(np.float32)


def build_step_table(
    schedule: NoiseSchedule,
    prediction_type: PredictionType,
    solver: Solver,
    timesteps: Array,
    *,
    next_timesteps: Array | None = None,
    sigmas: Array | None = None,
    initial_scale: float | Literal["sigma"] = 1.0,
    eta: float = 0.0,
    timestep_scaling: float = LCM_TIMESTEP_SCALING,
    output_sign: Literal[1, -1] = 1,
) -> StepTable:
    """Compute a table.

    Args:
        timesteps: K timesteps, falling, that the denoiser receives.
        next_timesteps: where each step lands. By default the next timestep, and for the last step the clean end
            (any value below 0, or flow time 0); tcd ends at timestep 0. diffusers' DDIM lands at t - T // K instead.
        sigmas: K + 1 noise levels, falling, in the units of `NoiseSchedule.levels_at`: where the steps start, and
            where the last one lands. By default the levels of the timesteps. With them the timesteps are only what
            the denoiser receives, and may repeat.
        initial_scale: see `StepTable.initial_scale`; "sigma" is the noise level of the first step.
        eta: tcd only, gamma of its paper: share of the way to the clean end that each step goes too far, and returns
            by fresh noise. 0 draws none, 1 keeps nothing of the old noise.
        timestep_scaling: lcm only, see `boundary_scalings`.
        output_sign: factor on the model output before it is read as `prediction_type`.

    Raises:
        RecipeError: the timesteps or sigmas do not fall, or solver, prediction and schedule do not fit together.
    """
    _check_timesteps(schedule, timesteps, may_repeat=sigmas is not None)
    _check_fit(schedule, prediction_type, solver)
    middle = None
    if sigmas is not None:
        if next_timesteps is not None or solver == "tcd":
            raise RecipeError(
                f"sigmas are {sigmas.tolist()}, but solver {solver!r} with next_timesteps "
                f"{None if next_timesteps is None else next_timesteps.tolist()} reads its noise levels from timesteps; "
                "leave the sigmas out"
            )
        _check_sigmas(timesteps, sigmas)
        current, following = schedule.levels_at(sigmas[:-1]), schedule.levels_at(sigmas[1:])
    else:
        landings = _landings(schedule, solver, timesteps) if next_timesteps is None else next_timesteps
        if landings.shape != timesteps.shape or not np.all(landings <= timesteps):
            raise RecipeError(
                f"next_timesteps must hold one number for each of {timesteps.tolist()}, not above it; "
                f"got {landings.tolist()}"
            )
        current, following = schedule.levels(timesteps), schedule.levels(landings)
        if solver == "tcd":
            middle = schedule.levels(np.floor((1.0 - eta) * landings))
    if prediction_type == "epsilon" and np.any(current.alphas == 0):
        raise RecipeError(
            f"prediction_type 'epsilon' is undefined at timestep {timesteps[0]:g}, where the schedule has no signal; "
            "use v_prediction, or a schedule without zero terminal SNR"
        )
    if np.any(current.sigmas == 0):
        raise RecipeError(f"no step can start at timestep {timesteps[-1]:g}, where the schedule has no noise")
    with np.errstate(divide="ignore", invalid="ignore"):
        p, q = denoise_columns(prediction_type, current)
        q = output_sign * q
        a, b, c, d, e = solver_columns(solver, current, following, middle)
    if solver == "lcm":
        c_skip, c_out = boundary_scalings(timesteps, timestep_scaling)
        p, q = c_skip + c_out * p, c_out * q
    scale = float(current.sigmas[0]) if initial_scale == "sigma" else float(initial_scale)
    return StepTable(timesteps.copy(), p, q, a, b, c, d, e, current.alphas.copy(), current.sigmas.copy(), scale)


def _landings(schedule: NoiseSchedule, solver: Solver, timesteps: Array) -> Array:
    is_clean_below_zero = isinstance(schedule, DiffusionSchedule) and solver != "tcd"
    return np.append(timesteps[1:], -1.0 if is_clean_below_zero else 0.0)


def _check_timesteps(schedule: NoiseSchedule, timesteps: Array, *, may_repeat: bool) -> None:
    gaps = np.diff(timesteps)
    if timesteps.ndim != 1 or len(timesteps) == 0 or np.any(gaps > 0 if may_repeat else gaps >= 0):
        raise RecipeError(f"timesteps must be a falling list of at least one number, got {timesteps.tolist()}")
    if not np.all((timesteps >= 0) & (timesteps <= schedule.max_timestep)):
        raise RecipeError(f"timesteps leave 0..{schedule.max_timestep}: {timesteps.tolist()}")


def _check_sigmas(timesteps: Array, sigmas: Array) -> None:
    is_list = sigmas.shape == (len(timesteps) + 1,)
    if not is_list or not np.all(np.isfinite(sigmas)) or np.any(np.diff(sigmas) >= 0) or sigmas[-1] < 0:
        raise RecipeError(
            f"sigmas of {len(timesteps)} steps must be a falling list of {len(timesteps) + 1} numbers, none below 0, "
            f"the last one where the last step lands; got {sigmas.tolist()}"
        )


def _check_fit(schedule: NoiseSchedule, prediction_type: PredictionType, solver: Solver) -> None:
    kind = type(schedule).__name__
    if isinstance(schedule, FlowSchedule) != (prediction_type == "flow_prediction"):
        raise RecipeError(
            f"prediction_type {prediction_type!r} does not fit a {kind}: "
            "flow_prediction goes with a flow schedule and with nothing else"
        )
    if isinstance(schedule, TrigFlowSchedule) and prediction_type != "v_prediction":
        raise RecipeError(f"prediction_type {prediction_type!r} does not fit a {kind}; use v_prediction")
    if solver in DIFFUSION_SOLVERS and not isinstance(schedule, DiffusionSchedule):
        raise RecipeError(f"solver {solver!r} does not fit a {kind}; use a diffusion schedule, or solver 'renoise'")


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
