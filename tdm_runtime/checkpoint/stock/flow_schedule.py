"""Stock schedulers of flows: FlowMatchEuler, and SCM on TrigFlow."""

from __future__ import annotations

import numpy as np

from tdm_runtime.checkpoint.sampling_fields import Sampling, lists_of
from tdm_runtime.checkpoint.stock.pipeline_call import PipelineCall, ScheduleRequest
from tdm_runtime.checkpoint.stock.scheduler_config import SchedulerConfig, Settings
from tdm_runtime.errors import RecipeError
from tdm_runtime.sampling.schedule import Array, FlowSchedule, TrigFlowSchedule, as_array
from tdm_runtime.sampling.size_shift import SizeShift


def flow_match_euler_sampling(config: SchedulerConfig, request: ScheduleRequest) -> Sampling:
    """Follow FlowMatchEulerDiscreteScheduler.

    With `stochastic_sampling` stock pipelines of flows draw from torch's global generator, not from that of the call.
    Ours draw from the seed, as everywhere.
    """
    config.require("invert_sigmas", False)
    config.require("use_beta_sigmas", False)
    config.require("time_shift_type", "exponential", "linear")
    total = config["num_train_timesteps"]
    is_dynamic, is_stochastic = config["use_dynamic_shifting"], config["stochastic_sampling"]
    schedule = FlowSchedule(1.0 if is_dynamic else float(config["shift"]), total)
    unshifted = {k: _own_sigmas(schedule, request, k) for k in request.step_counts}
    if request.sigmas is not None:
        unshifted[len(request.sigmas)] = as_array(request.sigmas)
    size_shift = None
    terminal = config["shift_terminal"] or None
    if is_dynamic:
        for setting in ("use_karras_sigmas", "use_exponential_sigmas"):
            config.require(setting, False)
        size_shift = size_shift_of(config.settings, request.call, terminal)
        sigmas = unshifted
    else:
        sigmas = {k: _static_sigmas(config, schedule, s, terminal) for k, s in unshifted.items()}
    return Sampling(
        prediction_type="flow_prediction",
        noise_schedule=schedule,
        solver="renoise" if is_stochastic else "euler",
        timesteps=lists_of({k: total * s for k, s in sigmas.items()}),
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
        return config.sigma_curve(shifted[0], shifted[-1], len(shifted))
    return shifted


def size_shift_of(config: Settings, call: PipelineCall, terminal: float | None = None) -> SizeShift:
    """Return the shift by size of a FlowMatchEulerDiscreteScheduler with `use_dynamic_shifting`.

    Args:
        config: its config, with the class's defaults.

    Raises:
        RecipeError: the pipeline gives no mu, or a number cannot be followed.
    """
    if call.mu is None:
        raise RecipeError("use_dynamic_shifting is true, but this pipeline gives no mu; set it to false")
    if call.mu == "flux2":
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


def scm_sampling(config: SchedulerConfig, request: ScheduleRequest) -> Sampling:
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
    return Sampling("v_prediction", schedule, "renoise", lists_of(timesteps))
