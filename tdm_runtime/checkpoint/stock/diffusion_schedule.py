"""Stock schedulers of diffusion models: DDIM, Euler, Euler ancestral, LCM and TCD."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from tdm_runtime.checkpoint.sampling_fields import Sampling, lists_of
from tdm_runtime.checkpoint.stock.pipeline_call import ScheduleRequest
from tdm_runtime.checkpoint.stock.scheduler_config import SIGNAL_KEPT, SchedulerConfig
from tdm_runtime.errors import RecipeError
from tdm_runtime.sampling.schedule import Array, DiffusionSchedule, as_array, spaced_timesteps
from tdm_runtime.sampling.solvers import Solver


def ddim_sampling(config: SchedulerConfig, request: ScheduleRequest) -> Sampling:
    for setting in ("clip_sample", "thresholding"):
        config.require(setting, False)
    schedule = config.diffusion_schedule()
    total = schedule.num_train_timesteps
    timesteps = {k: np.round(_spaced(config, k, total)) for k in request.step_counts}
    final = -1.0 if config["set_alpha_to_one"] else 0.0
    landings = {}
    for k, starts in timesteps.items():
        landing = starts - total // k
        landings[k] = np.where(landing < 0, final, landing)
    by_default = {k: np.append(starts[1:], -1.0) for k, starts in timesteps.items()}
    return Sampling(
        prediction_type=config["prediction_type"],
        noise_schedule=schedule,
        solver="ddim",
        timesteps=lists_of(timesteps),
        next_timesteps=lists_of({k: v for k, v in landings.items() if not np.array_equal(v, by_default[k])}),
    )


def stochastic_dpm_sampling(config: SchedulerConfig, request: ScheduleRequest) -> Sampling:
    """Follow CogVideoXDPMScheduler, which lands where CogVideoXDDIMScheduler does."""
    sampling = ddim_sampling(config, request)
    if not config["set_alpha_to_one"]:
        raise RecipeError("set_alpha_to_one of the CogVideoXDPMScheduler is False; this version follows True only")
    return replace(sampling, solver="sde-dpmsolver++")


def euler_sampling(config: SchedulerConfig, request: ScheduleRequest) -> Sampling:
    config.require("interpolation_type", "linear")
    config.require("timestep_type", "discrete")
    config.require("use_beta_sigmas", False)
    schedule = config.diffusion_schedule(SIGNAL_KEPT)
    ratios = ratios_of(schedule)
    is_curved = config["use_karras_sigmas"] or config["use_exponential_sigmas"]
    final = {"zero": 0.0, "sigma_min": float(ratios[0])}[config.final_sigmas_type()]
    timesteps: dict[int, Array] = {}
    sigmas: dict[int, Array] = {}
    if request.sigmas is not None:
        given = as_array(request.sigmas)
        if len(given) < 2:
            raise RecipeError(
                f"sigmas are {given.tolist()}; an EulerDiscreteScheduler takes K + 1 of them, the last where "
                "the last step lands"
            )
        timesteps[len(given) - 1], sigmas[len(given) - 1] = timesteps_of(given[:-1], ratios), given
    elif is_curved and request.timesteps is not None:
        raise RecipeError("timesteps are given, but the scheduler computes its own sigmas; switch use_*_sigmas off")
    for k, starts in _given_or_spaced(config, request, schedule).items():
        timesteps[k] = starts
        if is_curved:
            levels = np.interp(starts, np.arange(len(ratios)), ratios)
            low, high = (config[name] for name in ("sigma_min", "sigma_max"))
            ends = (levels[0] if high is None else high, levels[-1] if low is None else low)
            curve = config.sigma_curve(*ends, k)
            timesteps[k], sigmas[k] = timesteps_of(curve, ratios), np.append(curve, final)
    landings = {}
    if final and not sigmas:
        landings = {k: np.append(starts[1:], 0.0) for k, starts in timesteps.items()}
    return Sampling(
        prediction_type=config["prediction_type"],
        noise_schedule=schedule,
        solver="euler",
        timesteps=lists_of(timesteps),
        sigmas=lists_of(sigmas),
        next_timesteps=lists_of(landings),
        initial_scale=1.0 if config["timestep_spacing"] == "leading" else "sigma",
    )


def euler_ancestral_sampling(config: SchedulerConfig, request: ScheduleRequest) -> Sampling:
    config.require("prediction_type", "epsilon", "v_prediction")
    schedule = config.diffusion_schedule(SIGNAL_KEPT)
    timesteps = {k: _spaced(config, k, schedule.num_train_timesteps) for k in request.step_counts}
    return Sampling(
        prediction_type=config["prediction_type"],
        noise_schedule=schedule,
        solver="euler_ancestral",
        timesteps=lists_of(timesteps),
        initial_scale=1.0 if config["timestep_spacing"] == "leading" else "sigma",
    )


def consistency_sampling(config: SchedulerConfig, request: ScheduleRequest) -> Sampling:
    """LCM and TCD: timesteps out of the evenly spaced ones of the distillation."""
    for setting in ("clip_sample", "thresholding"):
        config.require(setting, False)
    schedule = config.diffusion_schedule()
    original = config["original_inference_steps"]
    if not 1 <= original <= schedule.num_train_timesteps:
        raise RecipeError(
            f"original_inference_steps is {original}; it must be from 1 to {schedule.num_train_timesteps}"
        )
    spaced = (np.arange(1, original + 1) * (schedule.num_train_timesteps // original) - 1)[::-1]
    timesteps = {}
    for k in request.step_counts:
        if k > original:
            raise RecipeError(
                f"steps has {k}; original_inference_steps of the {config.class_name} is {original}, give at most that"
            )
        timesteps[k] = spaced[np.floor(np.linspace(0, original, k, endpoint=False)).astype(int)].astype(float)
    if request.timesteps is not None:
        timesteps[len(request.timesteps)] = np.trunc(request.timesteps)
    solver: Solver = "lcm" if config.class_name == "LCMScheduler" else "tcd"
    options: dict[str, Any] = (
        {"timestep_scaling": float(config["timestep_scaling"])} if solver == "lcm" else {"eta": request.eta}
    )
    return Sampling(config["prediction_type"], schedule, solver, lists_of(timesteps), **options)


def _spaced(config: SchedulerConfig, k: int, total: int) -> Array:
    spacing = config["timestep_spacing"]
    config.require("timestep_spacing", "linspace", "leading", "trailing")
    return spaced_timesteps(spacing, k, total, config["steps_offset"])


def _given_or_spaced(
    config: SchedulerConfig, request: ScheduleRequest, schedule: DiffusionSchedule
) -> Mapping[int, Array]:
    found = {k: _spaced(config, k, schedule.num_train_timesteps) for k in request.step_counts}
    if request.timesteps is not None:
        found[len(request.timesteps)] = as_array(request.timesteps)
    return found


def ratios_of(schedule: DiffusionSchedule) -> Array:
    """Return the ratio of noise to signal at each timestep, rising, [T]."""
    alphas_cumprod = schedule.alphas_cumprod
    ratios: Array = np.sqrt((1.0 - alphas_cumprod) / alphas_cumprod)
    return ratios


def timesteps_of(sigmas: Array, ratios: Array) -> Array:
    """Return the fractional timesteps of ratios, linear in their logarithm."""
    return np.interp(np.log(np.maximum(sigmas, 1e-10)), np.log(ratios), np.arange(len(ratios), dtype=np.float64))
