"""Solvers as columns: how much of x_j, denoised_j, denoised_{j-1} and fresh noise the next latents hold.

The one-step solvers differ in one number only, the noise that they keep. Their next latents must hold the signal
alpha' x_0 and noise of scale sigma' (dashes mark where the step lands). They keep noise of scale `kept` of the old
latents and draw the rest:

    a = kept / sigma        b = alpha' - alpha a        d = sqrt(sigma'^2 - kept^2)
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from tdm_runtime.errors import RecipeError
from tdm_runtime.sampling.schedule import Array, NoiseLevels

Solver = Literal["ddim", "euler", "dpmsolver++", "renoise", "lcm", "tcd", "euler_ancestral"]
SOLVERS: tuple[str, ...] = get_args(Solver)
DeterministicSolver = Literal["ddim", "euler", "dpmsolver++"]
"""Solvers that draw no noise, so that training can roll out by a, b and c alone."""
DIFFUSION_SOLVERS: tuple[str, ...] = ("lcm", "tcd", "euler_ancestral")
"""Solvers that are defined on diffusion schedules only."""

SolverColumns = tuple[Array, Array, Array, Array]
"""a, b, c and d, [K] each."""
LCM_SIGMA_DATA = 0.5
"""Standard deviation of the data in LCM's boundary scalings."""


def solver_columns(
    solver: Solver, level: NoiseLevels, following: NoiseLevels, middle: NoiseLevels | None = None
) -> SolverColumns:
    """Compute the columns a, b, c and d.

    Args:
        level: Where the K steps start.
        following: Where they land.
        middle: tcd only: where each step stops before it adds noise.

    Raises:
        RecipeError: the solver is unknown.
    """
    if solver == "dpmsolver++":
        return _dpm_solver_columns(level, following)
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
    return a, following.alphas - level.alphas * a, np.zeros_like(a), d


def boundary_scalings(timesteps: Array, timestep_scaling: float) -> tuple[Array, Array]:
    """Return c_skip and c_out of LCM (Luo et al. 2023, sec. 4.1), as diffusers' LCMScheduler computes them.

    denoised = c_skip latents + c_out x_0, where x_0 follows from the model output.
    """
    scaled = timesteps * timestep_scaling
    return LCM_SIGMA_DATA**2 / (scaled**2 + LCM_SIGMA_DATA**2), scaled / np.sqrt(scaled**2 + LCM_SIGMA_DATA**2)


def _dpm_solver_columns(level: NoiseLevels, following: NoiseLevels) -> SolverColumns:
    """DPM-Solver++ 2M (Lu et al. 2022, algorithm 2): second order between, first order at both ends."""
    log_snr = np.log(level.alphas) - np.log(level.sigmas)
    log_snr_next = np.log(following.alphas) - np.log(following.sigmas)
    h = log_snr_next - log_snr
    a = following.sigmas / level.sigmas
    first_order = -following.alphas * np.expm1(-h)
    b, c = first_order.copy(), np.zeros_like(a)
    inner = slice(1, len(a) - 1)
    half_ratio = 0.5 * h[inner] / np.diff(log_snr)[:-1]  # 1 / (2 r), r = h_{j-1} / h_j
    b[inner] = first_order[inner] * (1.0 + half_ratio)
    c[inner] = -first_order[inner] * half_ratio
    return a, b, c, np.zeros_like(a)
