"""`PipelineCall`: what a stock pipeline gives its scheduler, and `ScheduleRequest`: what one call asks of it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from tdm_runtime.checkpoint.recipe import MAX_STEPS
from tdm_runtime.errors import RecipeError
from tdm_runtime.sampling.size_shift import MuRule


@dataclass(frozen=True)
class PipelineCall:
    """How the stock pipeline of a family calls `set_timesteps`, and the defaults of its `__call__`."""

    takes_timesteps: bool = False
    """Whether it has the argument `timesteps`."""
    takes_sigmas: bool = False
    """Whether it has the argument `sigmas`."""
    gives_even_sigmas: bool = False
    """Whether it gives sigmas 1, ..., 1 / K where the caller gives none."""
    mu: MuRule | None = None
    """How it computes mu for a scheduler with `use_dynamic_shifting`; None if it gives none."""
    one_step_is_denoised: bool = False
    """Whether, at one step, it decodes what the step expects to be clean and not where the step lands."""
    guidance_scale: float | None = None
    """Default guidance scale, which checkpoints read that were distilled to; None if the pipeline has no such input."""
    size: tuple[int, int] | None = None
    """Default (width, height) in pixels; None if the denoiser's `sample_size` says it."""


PIPELINE_CALLS: Mapping[str, PipelineCall] = {
    "stable_diffusion": PipelineCall(takes_timesteps=True, takes_sigmas=True, guidance_scale=7.5),
    "sdxl": PipelineCall(takes_timesteps=True, takes_sigmas=True, guidance_scale=5.0),
    "pixart": PipelineCall(takes_timesteps=True, takes_sigmas=True, one_step_is_denoised=True),
    "sd3": PipelineCall(takes_sigmas=True, mu="tokens"),
    "flux": PipelineCall(
        takes_sigmas=True,
        gives_even_sigmas=True,
        mu="tokens",
        guidance_scale=3.5,
        size=(1024, 1024),
    ),
    "flux2": PipelineCall(
        takes_sigmas=True,
        gives_even_sigmas=True,
        mu="flux2",
        guidance_scale=4.0,
        size=(1024, 1024),
    ),
    "z_image": PipelineCall(takes_sigmas=True, gives_even_sigmas=True, mu="tokens", size=(1024, 1024)),
    "sana": PipelineCall(takes_timesteps=True, guidance_scale=4.5),
    "cogvideox": PipelineCall(takes_timesteps=True),
    "wan": PipelineCall(size=(832, 480)),
    "animatediff": PipelineCall(),
}
"""Family name -> call, read in diffusers 0.42."""
GUIDANCE_SCALES: Mapping[str, float] = {"LatentConsistencyModelPipeline": 8.5}
"""Pipeline class -> its default guidance scale, where it differs from the family's."""


@dataclass(frozen=True)
class ScheduleRequest:
    """Arguments of one or several calls of a stock pipeline that decide its schedule."""

    call: PipelineCall
    step_counts: tuple[int, ...]
    """`num_inference_steps` of each call."""
    timesteps: tuple[float, ...] | None = None
    """Argument `timesteps`; the step count is its length then."""
    sigmas: tuple[float, ...] | None = None
    """Argument `sigmas`."""
    eta: float = 0.0
    """Argument `eta`, which TCD reads."""

    @classmethod
    def of(
        cls,
        family: str,
        steps: tuple[int, ...] | None,
        timesteps: tuple[float, ...] | None,
        sigmas: tuple[float, ...] | None,
        eta: float = 0.0,
    ) -> ScheduleRequest:
        """Check arguments against what the family's pipeline takes. One of `steps` and the two lists is needed.

        Raises:
            RecipeError: naming the argument, its value and what is allowed.
        """
        call = PIPELINE_CALLS.get(family)
        if call is None:
            raise RecipeError(f"family {family!r} has no known pipeline call; known are {', '.join(PIPELINE_CALLS)}")
        if timesteps is not None and sigmas is not None:
            raise RecipeError(f"timesteps {list(timesteps)} and sigmas {list(sigmas)} are both given; give one of them")
        for name, values, takes in (
            ("timesteps", timesteps, call.takes_timesteps),
            ("sigmas", sigmas, call.takes_sigmas),
        ):
            if values is not None and not takes:
                other = "sigmas" if name == "timesteps" and call.takes_sigmas else "steps"
                raise RecipeError(f"{name} are {list(values)}; the pipeline of {family} takes none, give {other}")
            if values is not None and any(a <= b for a, b in itertools.pairwise(values)):
                raise RecipeError(f"{name} are {list(values)}; they must fall from each step to the next")
        counts = steps or ()
        for count in counts:
            if not 1 <= count <= MAX_STEPS:
                raise RecipeError(f"steps has {count}; whole numbers from 1 to {MAX_STEPS} are served")
        return cls(call, tuple(sorted(set(counts))), timesteps, sigmas, eta)
