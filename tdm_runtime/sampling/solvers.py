"""Solvers as columns: how much of x_j, denoised_j, denoised_{j-1}, denoised_{j-2} and fresh noise x_{j+1} holds.

The one-step solvers differ in one number only, the noise that they keep. Their next latents must hold the signal
alpha' x_0 and noise of scale sigma' (dashes mark where the step lands). They keep noise of scale `kept` of the old
latents and draw the rest:

    a = kept / sigma        b = alpha' - alpha a        d = sqrt(sigma'^2 - kept^2)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import numpy as np

from tdm_runtime.errors import RecipeError
from tdm_runtime.sampling.schedule import Array, NoiseLevels

Solver = Literal["ddim", "euler", "dpmsolver++", "unipc", "sde-dpmsolver++", "renoise", "lcm", "tcd", "euler_ancestral"]
SOLVERS: tuple[str, ...] = get_args(Solver)
DeterministicSolver = Literal["ddim", "euler", "dpmsolver++"]
"""Solvers that draw no noise, so that training can roll out by a, b and c alone."""
DIFFUSION_SOLVERS: tuple[str, ...] = ("lcm", "tcd", "euler_ancestral")
"""Solvers that are defined on diffusion schedules only."""

DRAWS_A_STEP: Mapping[Solver, int] = {"sde-dpmsolver++": 2}
"""Noises that a step draws, where it is not one; see `SeedNoise`."""

SolverColumns = tuple[Array, Array, Array, Array, Array]
"""a, b, c, d and e, [K] each."""
LCM_SIGMA_DATA = 0.5
"""Standard deviation of the data in LCM's boundary scalings."""


def solver_columns(
    solver: Solver, level: NoiseLevels, following: NoiseLevels, middle: NoiseLevels | None = None
) -> SolverColumns:
    """Compute the columns a, b, c, d and e.

    Args:
        level: Where the K steps start.
        following: Where they land.
        middle: tcd only: where each step stops before it adds noise.

    Raises:
        RecipeError: the solver is unknown.
    """
    if solver == "dpmsolver++":
        return _dpm_solver_columns(level, following)
    if solver == "sde-dpmsolver++":
        return _stochastic_dpm_solver_columns(level, following)
    if solver == "unipc":
        return _unipc_columns(level, following)
    if solver in ("ddim", "euler"):
        # Euler on d(x/alpha)/d(sigma/alpha) is the DDIM step (Song et al. 2021, eq. 12) in other coordinates.
        kept = following.sigmas
    elif solver in ("renoise", "lcm"):  # Song et al. 2023, "Consistency Models", algorithm 1
        kept = np.zeros_like(following.sigmas)
    elif solver == "euler_ancestral":
        # k-diffusion's sigma_down is ratio'^2 / ratio, ratio = sigma / alpha; in our coordinates times alpha'.
        kept = following.sigmas * (following.sigmas * level.alphas) / (following.alphas * level.sigmas)
    elif solver == "tcd" and middle is not None:  # Zheng et al. 2024, "Trajectory Consistency Distillation", alg. 4
        kept = middle.sigmas * following.alphas / middle.alphas
    else:
        raise RecipeError(f"solver {solver!r} is unknown; use one of {', '.join(SOLVERS)}")
    a = kept / level.sigmas
    d = np.sqrt(np.maximum(following.sigmas**2 - kept**2, 0.0))
    return a, following.alphas - level.alphas * a, np.zeros_like(a), d, np.zeros_like(a)


def boundary_scalings(timesteps: Array, timestep_scaling: float) -> tuple[Array, Array]:
    """Return c_skip and c_out of LCM (Luo et al. 2023, sec. 4.1), as diffusers' LCMScheduler computes them.

    denoised = c_skip latents + c_out x_0, where x_0 follows from the model output.
    """
    scaled = timesteps * timestep_scaling
    return LCM_SIGMA_DATA**2 / (scaled**2 + LCM_SIGMA_DATA**2), scaled / np.sqrt(scaled**2 + LCM_SIGMA_DATA**2)


def _dpm_solver_columns(level: NoiseLevels, following: NoiseLevels) -> SolverColumns:
    """DPM-Solver++ 2M (Lu et al. 2022, algorithm 2): second order between, first order at both ends."""
    log_snr, h = _log_snr_steps(level, following)
    a = following.sigmas / level.sigmas
    first_order = -following.alphas * np.expm1(-h)
    b, c = first_order.copy(), np.zeros_like(a)
    inner = slice(1, len(a) - 1)
    half_ratio = 0.5 * h[inner] / np.diff(log_snr)[:-1]  # 1 / (2 r), r = h_{j-1} / h_j
    b[inner] = first_order[inner] * (1.0 + half_ratio)
    c[inner] = -first_order[inner] * half_ratio
    return a, b, c, np.zeros_like(a), np.zeros_like(a)


def _log_snr_steps(level: NoiseLevels, following: NoiseLevels) -> tuple[Array, Array]:
    """Return log(alpha / sigma) where each step starts, and by how much it grows."""
    log_snr = np.log(level.alphas) - np.log(level.sigmas)
    return log_snr, np.log(following.alphas) - np.log(following.sigmas) - log_snr


def _stochastic_dpm_solver_columns(level: NoiseLevels, following: NoiseLevels) -> SolverColumns:
    """SDE-DPM-Solver++ 2M (Lu et al. 2022, appendix) as CogVideoXDPMScheduler takes it.

    Second order between; first order in the first step, and in a last one that lands at the clean end.
    """
    log_snr, h = _log_snr_steps(level, following)
    fading = np.exp(-h)
    a = following.sigmas / level.sigmas * fading
    first_order = following.alphas * (1.0 - fading**2)
    half_ratio = np.zeros_like(h)  # 1 / (2 r), r = h_{j-1} / h_j; 0 after a step from pure noise, where h is infinite
    half_ratio[1:] = 0.5 * h[1:] / np.diff(log_snr)
    half_ratio[following.sigmas == 0] = 0.0
    b, c = first_order * (1.0 + half_ratio), -first_order * half_ratio
    return a, b, c, following.sigmas * np.sqrt(1.0 - fading**2), np.zeros_like(a)


def _unipc_columns(level: NoiseLevels, following: NoiseLevels) -> SolverColumns:
    """UniPC of order 2 with B(h) = e^h - 1 (Zhao et al. 2023, algorithms 5 and 6), predicting x_0.

    A step first corrects where the step before landed: y_j = x_j + u (m_j - m_{j-1}) + w (m_{j-2} - m_{j-1}), with
    m = denoised. Then it predicts from y_j. y_{j-1} itself is not needed, because x_j and y_j hold it alike.
    """
    log_snr, h = _log_snr_steps(level, following)
    steps = len(h)
    grown = following.alphas * -np.expm1(-h)  # alpha' (1 - e^-h)
    is_second = np.zeros(steps, dtype=bool)  # the last step lands in first order, as the first does
    is_second[1:-1] = True
    ratio = np.full(steps, np.inf)  # (lambda_{j-1} - lambda_j) / h_j
    ratio[is_second] = -np.diff(log_snr)[:-1] / h[is_second] if steps > 1 else ratio[is_second]
    u, w = np.zeros(steps), np.zeros(steps)
    for j in range(1, steps):
        before, corrected = j - 1, grown[j - 1]
        if not is_second[before]:
            u[j] = 0.5 * corrected
            continue
        hh, r = -h[before], ratio[before]
        phi_2 = np.expm1(hh) / hh - 1.0
        phi_3 = phi_2 / hh - 0.5
        right = np.array([phi_2, 2.0 * phi_3]) / np.expm1(hh)
        rho_before, rho_now = np.linalg.solve(np.array([[1.0, 1.0], [r, 1.0]]), right)
        u[j], w[j] = rho_now * corrected, (rho_before - 0.5) / r * corrected
    a = following.sigmas / level.sigmas
    slope = np.where(is_second, 0.5 * grown / ratio, 0.0)
    return a, a * u + grown - slope, slope - a * (u + w), np.zeros(steps), a * w
