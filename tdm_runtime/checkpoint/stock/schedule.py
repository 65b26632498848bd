"""Stock schedulers as `Sampling`: what diffusers' `set_timesteps` and `step` do, known before the first request.

One function a scheduler class (`diffusion_schedule`, `dpm_solver_schedule`, `flow_schedule`). Each gives exactly the
timesteps and noise levels of the class, or refuses by name the setting that it cannot follow. diffusers is not
imported; `tests/tdm_runtime/checkpoint/stock/test_schedule.py` compares with its classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from tdm_runtime.checkpoint.sampling_fields import Sampling
from tdm_runtime.checkpoint.stock.diffusion_schedule import (
    consistency_sampling,
    ddim_sampling,
    euler_ancestral_sampling,
    euler_sampling,
    stochastic_dpm_sampling,
)
from tdm_runtime.checkpoint.stock.dpm_solver_schedule import dpm_solver_sampling, unipc_sampling
from tdm_runtime.checkpoint.stock.flow_schedule import flow_match_euler_sampling, scm_sampling
from tdm_runtime.checkpoint.stock.pipeline_call import ScheduleRequest
from tdm_runtime.checkpoint.stock.scheduler_config import SchedulerConfig
from tdm_runtime.errors import RecipeError

_SAMPLINGS: Mapping[str, Callable[[SchedulerConfig, ScheduleRequest], Sampling]] = {
    "DDIMScheduler": ddim_sampling,
    "CogVideoXDDIMScheduler": ddim_sampling,
    "EulerDiscreteScheduler": euler_sampling,
    "EulerAncestralDiscreteScheduler": euler_ancestral_sampling,
    "CogVideoXDPMScheduler": stochastic_dpm_sampling,
    "DPMSolverMultistepScheduler": dpm_solver_sampling,
    "UniPCMultistepScheduler": unipc_sampling,
    "LCMScheduler": consistency_sampling,
    "TCDScheduler": consistency_sampling,
    "FlowMatchEulerDiscreteScheduler": flow_match_euler_sampling,
    "SCMScheduler": scm_sampling,
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


def sampling_of(config: SchedulerConfig, request: ScheduleRequest) -> Sampling:
    """Return how a stock pipeline samples with a scheduler.

    Raises:
        RecipeError: the class does not take the arguments, or has a setting that cannot be followed exactly.
    """
    takes = _TAKES.get(config.class_name, ())
    for name, values in (("timesteps", request.timesteps), ("sigmas", request.sigmas)):
        if values is not None and name not in takes:
            raise RecipeError(f"{name} are {list(values)}; a {config.class_name} takes none, give steps")
    if request.eta and config.class_name != "TCDScheduler":
        raise RecipeError(f"eta is {request.eta:g}; this version follows it for TCDScheduler only, leave it out")
    if request.call.gives_even_sigmas and config.class_name != "FlowMatchEulerDiscreteScheduler":
        raise RecipeError(
            f"_class_name is {config.class_name}; this pipeline gives sigmas and mu, which only "
            "FlowMatchEulerDiscreteScheduler takes: save the folder with it"
        )
    sampling = _SAMPLINGS[config.class_name](config, request)
    if request.call.one_step_is_denoised and 1 in sampling.next_timesteps:
        landings = {k: landing for k, landing in sampling.next_timesteps.items() if k != 1}
        return replace(sampling, next_timesteps=landings)
    return sampling
