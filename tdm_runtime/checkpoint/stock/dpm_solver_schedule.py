"""Stock DPM-Solver++ 2M, on the betas of diffusion models and on flows, and UniPC on flows."""

from __future__ import annotations

import math

import numpy as np

from tdm_runtime.checkpoint.sampling_fields import Sampling, lists_of
from tdm_runtime.checkpoint.stock.diffusion_schedule import ratios_of, timesteps_of
from tdm_runtime.checkpoint.stock.pipeline_call import ScheduleRequest
from tdm_runtime.checkpoint.stock.scheduler_config import SIGNAL_KEPT, SchedulerConfig
from tdm_runtime.errors import RecipeError
from tdm_runtime.sampling.schedule import Array, FlowSchedule, spaced_timesteps
from tdm_runtime.sampling.solvers import Solver

FEW_STEPS = 15
"""Below it, `lower_order_final` ends DPM-Solver++ in first order."""
NOISE_KEPT_BACK = 1e-6
"""UniPC starts a flow this far below sigma 1, where the logarithm of the signal is finite."""
_CURVES = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


def dpm_solver_sampling(config: SchedulerConfig, request: ScheduleRequest) -> Sampling:
    config.require("algorithm_type", "dpmsolver++", "deis")
    config.require("solver_type", "midpoint", "logrho", "bh1", "bh2")
    config.require("solver_order", 1, 2, 3)
    config.require("variance_type", None)
    config.require("lambda_min_clipped", -math.inf, None)
    for setting in ("thresholding", "use_beta_sigmas", "use_lu_lambdas", "use_dynamic_shifting"):
        config.require(setting, False)
    solver: Solver = "ddim" if config["solver_order"] == 1 else "dpmsolver++"
    follow = _dpm_flow if config["use_flow_sigmas"] else _dpm_diffusion
    sampling = follow(config, request, solver)
    for k in sampling.timesteps:
        _check_orders(config, k)
    return sampling


def _check_orders(config: SchedulerConfig, k: int) -> None:
    """Check that K steps are of first order at both ends and of second order between, as the step table's."""
    is_lowered = config["lower_order_final"] and k < FEW_STEPS
    ends_first = config["euler_at_final"] or is_lowered or config["final_sigmas_type"] == "zero"
    if config["solver_order"] > 1 and k > 1 and not ends_first:
        raise RecipeError(
            f"the last of {k} steps of this DPMSolverMultistepScheduler is of second order; set euler_at_final to true"
        )
    if config["solver_order"] == 3 and k > (4 if is_lowered else 3):
        raise RecipeError(f"solver_order is 3, which {k} steps reach; this version follows 1 and 2: set it to 2")


def _dpm_flow(config: SchedulerConfig, request: ScheduleRequest, solver: Solver) -> Sampling:
    config.require("prediction_type", "flow_prediction")
    config.require("final_sigmas_type", "zero")
    for setting in ("use_karras_sigmas", "use_exponential_sigmas"):
        config.require(setting, False)
    if request.timesteps is not None:
        raise RecipeError(
            f"timesteps are {list(request.timesteps)}; a scheduler with use_flow_sigmas takes none, give steps"
        )
    schedule = FlowSchedule(float(config["flow_shift"]), config["num_train_timesteps"])
    total = schedule.num_train_timesteps
    timesteps, sigmas = {}, {}
    for k in request.step_counts:
        unshifted = 1.0 - np.linspace(1.0, 1.0 / total, k + 1)  # so the first is 1 - 1 / T
        shifted = schedule.shifted(unshifted)[::-1]
        sigmas[k], timesteps[k] = _rounded(shifted), np.trunc(shifted[:-1] * total)
    return Sampling("flow_prediction", schedule, solver, lists_of(timesteps), sigmas=lists_of(sigmas))


def unipc_sampling(config: SchedulerConfig, request: ScheduleRequest) -> Sampling:
    """Follow UniPCMultistepScheduler on a flow, as Wan's folders have it."""
    config.require("use_flow_sigmas", True)
    config.require("prediction_type", "flow_prediction")
    config.require("solver_type", "bh2", "midpoint", "heun", "logrho")
    config.require("solver_order", 2, 3)
    config.require("final_sigmas_type", "zero")
    config.require("disable_corrector", [])
    for setting, value in (("predict_x0", True), ("lower_order_final", True), ("solver_p", None)):
        config.require(setting, value)
    for setting in ("thresholding", *_CURVES, "use_dynamic_shifting"):
        config.require(setting, False)
    config.require("shift_terminal", None, 0)
    schedule = FlowSchedule(float(config["flow_shift"]), config["num_train_timesteps"])
    total = schedule.num_train_timesteps
    timesteps, sigmas = {}, {}
    for k in request.step_counts:
        if config["solver_order"] == 3 and k > 4:
            raise RecipeError(f"solver_order is 3, which {k} steps reach; this version follows 2: set it to 2")
        shifted = schedule.shifted(np.linspace(1.0, 1.0 / total, k + 1)[:-1])
        if abs(shifted[0] - 1.0) < NOISE_KEPT_BACK:
            shifted[0] -= NOISE_KEPT_BACK
        sigmas[k], timesteps[k] = _rounded(np.append(shifted, 0.0)), np.trunc(shifted * total)
    return Sampling("flow_prediction", schedule, "unipc", lists_of(timesteps), sigmas=lists_of(sigmas))


def _dpm_diffusion(config: SchedulerConfig, request: ScheduleRequest, solver: Solver) -> Sampling:
    config.require("prediction_type", "epsilon", "v_prediction", "sample")
    schedule = config.diffusion_schedule(SIGNAL_KEPT)
    ratios, total = ratios_of(schedule), schedule.num_train_timesteps
    final = {"zero": 0.0, "sigma_min": float(ratios[0])}[config.final_sigmas_type()]
    is_curved = config["use_karras_sigmas"] or config["use_exponential_sigmas"]
    if is_curved and request.timesteps is not None:
        raise RecipeError("timesteps are given, but the scheduler computes its own sigmas; switch use_*_sigmas off")
    timesteps: dict[int, Array] = {}
    sigmas: dict[int, Array] = {}
    for k in request.step_counts:
        if is_curved:
            curve = config.sigma_curve(ratios[-1], ratios[0], k)
            received = timesteps_of(curve, ratios)
            if config["use_karras_sigmas"] and config["beta_schedule"] != "squaredcos_cap_v2":
                received = np.round(received)
            timesteps[k], sigmas[k] = np.trunc(received), np.append(curve, final)
        elif config["timestep_spacing"] == "trailing":
            timesteps[k] = spaced_timesteps("trailing", k, total)
        elif config["timestep_spacing"] == "linspace":
            timesteps[k] = np.round(np.linspace(0, total - 1, k + 1))[::-1][:-1]
        else:  # leading
            timesteps[k] = np.arange(k, 0, -1.0) * (total // (k + 1)) + config["steps_offset"]
    if request.timesteps is not None:
        timesteps[len(request.timesteps)] = np.trunc(request.timesteps)
    landings = {}
    if final and not sigmas:
        landings = {k: np.append(starts[1:], 0.0) for k, starts in timesteps.items()}
    return Sampling(
        prediction_type=config["prediction_type"],
        noise_schedule=schedule,
        solver=solver,
        timesteps=lists_of(timesteps),
        sigmas=lists_of(sigmas),
        next_timesteps=lists_of(landings),
    )


def _rounded(sigmas: Array) -> Array:
    """Return sigmas as diffusers keeps them, in float32. Near sigma 1 the signal 1 - sigma depends on it."""
    return sigmas.astype(np.float32).astype(np.float64)
