"""Stock schedulers as `Sampling`: what diffusers' `set_timesteps` and `step` do, known before the first request.

One function a scheduler class. Each gives exactly the timesteps and noise levels of the class, or refuses by name the
setting that it cannot follow. diffusers is not imported; `tests/tdm_runtime/checkpoint/test_stock_schedule.py` compares
with its classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tdm_runtime.checkpoint.pipeline_call import ScheduleRequest
from tdm_runtime.checkpoint.sampling_fields import Sampling
from tdm_runtime.checkpoint.scheduler_config import SchedulerConfig
from tdm_runtime.errors import RecipeError
from tdm_runtime.sampling.schedule import (
    Array,
    DiffusionSchedule,
    FlowSchedule,
    TrigFlowSchedule,
    as_array,
    spaced_timesteps,
)
from tdm_runtime.sampling.size_shift import SizeShift
from tdm_runtime.sampling.solvers import Solver

Numbers = tuple[float, ...]
SIGNAL_KEPT = 2.0**-24
"""Floor of alphas_cumprod that Euler and DPM-Solver++ keep at zero terminal SNR."""
FEW_STEPS = 15
"""Below it, `lower_order_final` ends DPM-Solver++ in first order."""
KARRAS_RHO = 7.0


def sampling_of(config: SchedulerConfig, request: ScheduleRequest) -> Sampling:
    """Return how a stock pipeline samples with a scheduler.

    Raises:
        RecipeError: the class does not take the arguments, or has a setting that cannot be followed exactly.
    """
    takes = _TAKES.get(config.class_name, ())
    for name, values in (("timesteps", request.timesteps), ("sigmas", request.sigmas)):
        if values is not None and name not in takes:
            raise RecipeError(f"{name} are {list(values)}; a {config.class_name} takes none, give steps")
    if request.call.gives_even_sigmas and config.class_name != "FlowMatchEulerDiscreteScheduler":
        raise RecipeError(
            f"_class_name is {config.class_name}; this pipeline gives sigmas and mu, which only "
            "FlowMatchEulerDiscreteScheduler takes: save the folder with it"
        )
    return _SAMPLINGS[config.class_name](config, request)


# Diffusion schedules


def _ddim(config: SchedulerConfig, request: ScheduleRequest) -> Sampling:
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
        timesteps=_lists(timesteps),
        next_timesteps=_lists({k: v for k, v in landings.items() if not np.array_equal(v, by_default[k])}),
    )


def _euler(config: SchedulerConfig, request: ScheduleRequest) -> Sampling:
    config.require("interpolation_type", "linear")
    config.require("timestep_type", "discrete")
    config.require("use_beta_sigmas", False)
    schedule = config.diffusion_schedule(SIGNAL_KEPT)
    ratios = _ratios(schedule)
    is_curved = config["use_karras_sigmas"] or config["use_exponential_sigmas"]
    final = {"zero": 0.0, "sigma_min": float(ratios[0])}[_final_sigmas_type(config)]
    timesteps: dict[int, Array] = {}
    sigmas: dict[int, Array] = {}
    if request.sigmas is not None:
        given = as_array(request.sigmas)
        if len(given) < 2:
            raise RecipeError(
                f"sigmas are {given.tolist()}; an EulerDiscreteScheduler takes K + 1 of them, the last where "
                "the last step lands"
            )
        timesteps[len(given) - 1], sigmas[len(given) - 1] = _timesteps_of(given[:-1], ratios), given
    elif is_curved and request.timesteps is not None:
        raise RecipeError("timesteps are given, but the scheduler computes its own sigmas; switch use_*_sigmas off")
    for k, starts in _given_or_spaced(config, request, schedule).items():
        timesteps[k] = starts
        if is_curved:
            levels = np.interp(starts, np.arange(len(ratios)), ratios)
            low, high = (config[name] for name in ("sigma_min", "sigma_max"))
            ends = (levels[0] if high is None else high, levels[-1] if low is None else low)
            curve = _curve(config, *ends, k)
            timesteps[k], sigmas[k] = _timesteps_of(curve, ratios), np.append(curve, final)
    landings = {}
    if final and not sigmas:
        landings = {k: np.append(starts[1:], 0.0) for k, starts in timesteps.items()}
    return Sampling(
        prediction_type=config["prediction_type"],
        noise_schedule=schedule,
        solver="euler",
        timesteps=_lists(timesteps),
        sigmas=_lists(sigmas),
        next_timesteps=_lists(landings),
        initial_scale=1.0 if config["timestep_spacing"] == "leading" else "sigma",
    )


def _euler_ancestral(config: SchedulerConfig, request: ScheduleRequest) -> Sampling:
    config.require("prediction_type", "epsilon", "v_prediction")
    schedule = config.diffusion_schedule(SIGNAL_KEPT)
    timesteps = {k: _spaced(config, k, schedule.num_train_timesteps) for k in request.step_counts}
    return Sampling(
        prediction_type=config["prediction_type"],
        noise_schedule=schedule,
        solver="euler_ancestral",
        timesteps=_lists(timesteps),
        initial_scale=1.0 if config["timestep_spacing"] == "leading" else "sigma",
    )


def _consistency(config: SchedulerConfig, request: ScheduleRequest) -> Sampling:
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
    return Sampling(config["prediction_type"], schedule, solver, _lists(timesteps), **options)


# DPM-Solver++, on diffusion schedules and on flows


def _dpm_solver(config: SchedulerConfig, request: ScheduleRequest) -> Sampling:
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
    return Sampling("flow_prediction", schedule, solver, _lists(timesteps), sigmas=_lists(sigmas))


def _dpm_diffusion(config: SchedulerConfig, request: ScheduleRequest, solver: Solver) -> Sampling:
    config.require("prediction_type", "epsilon", "v_prediction", "sample")
    schedule = config.diffusion_schedule(SIGNAL_KEPT)
    ratios, total = _ratios(schedule), schedule.num_train_timesteps
    final = {"zero": 0.0, "sigma_min": float(ratios[0])}[_final_sigmas_type(config)]
    is_curved = config["use_karras_sigmas"] or config["use_exponential_sigmas"]
    if is_curved and request.timesteps is not None:
        raise RecipeError("timesteps are given, but the scheduler computes its own sigmas; switch use_*_sigmas off")
    timesteps: dict[int, Array] = {}
    sigmas: dict[int, Array] = {}
    for k in request.step_counts:
        if is_curved:
            curve = _curve(config, ratios[-1], ratios[0], k)
            received = _timesteps_of(curve, ratios)
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
        timesteps=_lists(timesteps),
        sigmas=_lists(sigmas),
        next_timesteps=_lists(landings),
    )


# Flows and TrigFlow


def _flow_match_euler(config: SchedulerConfig, request: ScheduleRequest) -> Sampling:
    config.require("invert_sigmas", False)
    config.require("use_beta_sigmas", False)
    config.require("time_shift_type", "exponential", "linear")
    total = config["num_train_timesteps"]
    is_dynamic, is_stochastic = config["use_dynamic_shifting"], config["stochastic_sampling"]
    if is_stochastic and request.call.draws_packed:
        raise RecipeError(
            "stochastic_sampling is true; this pipeline draws its noise for packed tokens, which the step table cannot "
            "follow: set it to false"
        )
    schedule = FlowSchedule(1.0 if is_dynamic else float(config["shift"]), total)
    unshifted = {k: _own_sigmas(schedule, request, k) for k in request.step_counts}
    if request.sigmas is not None:
        unshifted[len(request.sigmas)] = as_array(request.sigmas)
    size_shift = None
    terminal = config["shift_terminal"] or None
    if is_dynamic:
        for setting in ("use_karras_sigmas", "use_exponential_sigmas"):
            config.require(setting, False)
        size_shift = _size_shift(config, request, terminal)
        sigmas = unshifted
    else:
        sigmas = {k: _static_sigmas(config, schedule, s, terminal) for k, s in unshifted.items()}
    return Sampling(
        prediction_type="flow_prediction",
        noise_schedule=schedule,
        solver="renoise" if is_stochastic else "euler",
        timesteps=_lists({k: total * s for k, s in sigmas.items()}),
        size_shift=size_shift,
    )


def _own_sigmas(schedule: FlowSchedule, request: ScheduleRequest, k: int) -> Array:
    if request.call.gives_even_sigmas:
        return np.linspace(1.0, 1.0 / k, k)
    # The class shifts its lowest sigma when it is made, and all of them again in set_timesteps.
    lowest = float(schedule.shifted(as_array([1.0 / schedule.num_train_timesteps]))[0])
    return np.linspace(1.0, lowest, k)


def _static_sigmas(config: SchedulerConfig, schedule: FlowSchedule, sigmas: Array, terminal: float | None) -> Array:
    shifted = schedule.shifted(sigmas)
    if terminal is not None:
        shifted = SizeShift(terminal=float(terminal)).stretched(shifted)
    if config["use_karras_sigmas"] or config["use_exponential_sigmas"]:
        return _curve(config, shifted[0], shifted[-1], len(shifted))
    return shifted


def _size_shift(config: SchedulerConfig, request: ScheduleRequest, terminal: float | None) -> SizeShift:
    if request.call.mu is None:
        raise RecipeError("use_dynamic_shifting is true, but this pipeline gives no mu; set it to false")
    if request.call.mu == "flux2":
        return SizeShift("flux2", curve=config["time_shift_type"], terminal=terminal)
    return SizeShift(
        mu="tokens",
        base_tokens=config["base_image_seq_len"],
        base_shift=config["base_shift"],
        max_tokens=config["max_image_seq_len"],
        max_shift=config["max_shift"],
        curve=config["time_shift_type"],
        terminal=terminal,
    )


def _scm(config: SchedulerConfig, request: ScheduleRequest) -> Sampling:
    config.require("prediction_type", "trigflow")
    schedule = TrigFlowSchedule()
    timesteps = {
        k: as_array([1.5708, 1.3]) if k == 2 else np.linspace(1.5708, 0.0, k + 1)[:-1] for k in request.step_counts
    }
    if request.timesteps is not None:
        if len(request.timesteps) < 2 or request.timesteps[-1] != 0.0:
            raise RecipeError(
                f"timesteps are {list(request.timesteps)}; a SCMScheduler takes K + 1 angles, falling from at most "
                "1.5708 to 0"
            )
        timesteps[len(request.timesteps) - 1] = as_array(request.timesteps[:-1])
    return Sampling("v_prediction", schedule, "renoise", _lists(timesteps))


# What several classes share


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


def _ratios(schedule: DiffusionSchedule) -> Array:
    """Return the ratio of noise to signal at each timestep, rising, [T]."""
    alphas_cumprod = schedule.alphas_cumprod
    ratios: Array = np.sqrt((1.0 - alphas_cumprod) / alphas_cumprod)
    return ratios


def _timesteps_of(sigmas: Array, ratios: Array) -> Array:
    """Return the fractional timesteps of ratios, linear in their logarithm."""
    return np.interp(np.log(np.maximum(sigmas, 1e-10)), np.log(ratios), np.arange(len(ratios), dtype=np.float64))


def _curve(config: SchedulerConfig, highest: float, lowest: float, k: int) -> Array:
    """Return K sigmas between two ends: Karras et al. 2022, eq. 5, or evenly spaced in their logarithm."""
    rho = KARRAS_RHO
    if config["use_karras_sigmas"]:
        curve: Array = np.linspace(highest ** (1 / rho), lowest ** (1 / rho), k) ** rho
        return curve
    return np.exp(np.linspace(math.log(highest), math.log(lowest), k))


def _rounded(sigmas: Array) -> Array:
    """Return sigmas as diffusers keeps them, in float32. Near sigma 1 the signal 1 - sigma depends on it."""
    return sigmas.astype(np.float32).astype(np.float64)


def _final_sigmas_type(config: SchedulerConfig) -> str:
    config.require("final_sigmas_type", "zero", "sigma_min")
    return str(config["final_sigmas_type"])


def _lists(arrays: Mapping[int, Array]) -> Mapping[int, Numbers]:
    return {k: tuple(array.tolist()) for k, array in sorted(arrays.items())}


_SAMPLINGS: Mapping[str, Callable[[SchedulerConfig, ScheduleRequest], Sampling]] = {
    "DDIMScheduler": _ddim,
    "CogVideoXDDIMScheduler": _ddim,
    "EulerDiscreteScheduler": _euler,
    "EulerAncestralDiscreteScheduler": _euler_ancestral,
    "DPMSolverMultistepScheduler": _dpm_solver,
    "LCMScheduler": _consistency,
    "TCDScheduler": _consistency,
    "FlowMatchEulerDiscreteScheduler": _flow_match_euler,
    "SCMScheduler": _scm,
}
_TAKES: Mapping[str, tuple[str, ...]] = {
    "EulerDiscreteScheduler": ("timesteps", "sigmas"),
    "DPMSolverMultistepScheduler": ("timesteps",),
    "LCMScheduler": ("timesteps",),
    "TCDScheduler": ("timesteps",),
    "FlowMatchEulerDiscreteScheduler": ("sigmas",),
    "SCMScheduler": ("timesteps",),
}
"""Class -> lists that its `set_timesteps` takes and some pipeline gives."""
