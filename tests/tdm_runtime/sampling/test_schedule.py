"""Noise schedules and timestep spacings equal those of diffusers."""

from __future__ import annotations

import math
from typing import Any, get_args

import numpy as np
import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.schedulers.scheduling_ddim import betas_for_alpha_bar, rescale_zero_terminal_snr

from tdm_runtime.errors import RecipeError
from tdm_runtime.sampling.schedule import (
    Array,
    BetaSchedule,
    DiffusionSchedule,
    FlowSchedule,
    Spacing,
    as_array,
    flow_timesteps,
    spaced_timesteps,
)

# diffusers calls np.array() on torch tensors
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

BETA_SCHEDULES: tuple[BetaSchedule, ...] = get_args(BetaSchedule)
SPACINGS: tuple[Spacing, ...] = get_args(Spacing)
BETA_RANGES = [(0.00085, 0.012), (0.0001, 0.02)]
STEP_COUNTS = range(1, 9)


def diffusers_betas(beta_schedule: BetaSchedule, start: float, end: float) -> torch.Tensor:
    """Compute the betas of diffusers in float64; its schedulers use float32."""
    if beta_schedule == "linear":
        return torch.linspace(start, end, 1000, dtype=torch.float64)
    if beta_schedule == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, 1000, dtype=torch.float64) ** 2
    return torch.as_tensor(betas_for_alpha_bar(1000)).double()


@pytest.mark.parametrize("is_rescaled", [False, True])
@pytest.mark.parametrize("beta_range", BETA_RANGES)
@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
def test_alphas_cumprod_equals_diffusers(
    beta_schedule: BetaSchedule, beta_range: tuple[float, float], is_rescaled: bool
) -> None:
    start, end = beta_range
    ours = DiffusionSchedule(beta_schedule, start, end, rescale_zero_terminal_snr=is_rescaled)
    theirs = DDIMScheduler(
        beta_schedule=beta_schedule, beta_start=start, beta_end=end, rescale_betas_zero_snr=is_rescaled
    )
    # Their cumulative product of 1000 float32 factors drifts by about 1000 * 2**-24.
    np.testing.assert_allclose(ours.alphas_cumprod, theirs.alphas_cumprod.double().numpy(), rtol=6e-5, atol=1e-8)


@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
def test_zero_terminal_snr_equals_the_rescale_of_diffusers(beta_schedule: BetaSchedule) -> None:
    betas = diffusers_betas(beta_schedule, 0.00085, 0.012)
    theirs = torch.cumprod(1.0 - rescale_zero_terminal_snr(betas), dim=0).numpy()
    ours = DiffusionSchedule(beta_schedule, rescale_zero_terminal_snr=True).alphas_cumprod
    # betas_for_alpha_bar rounds to float32, which matters where the cosine schedule caps beta at 0.999.
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6 if beta_schedule == "squaredcos_cap_v2" else 1e-12)
    assert ours[-1] == 0.0


@pytest.mark.parametrize("scheduler_class", [EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_min_alpha_cumprod_equals_the_floor_of_diffusers(scheduler_class: type) -> None:
    theirs = scheduler_class(rescale_betas_zero_snr=True, beta_schedule="scaled_linear")
    ours = DiffusionSchedule("scaled_linear", 0.0001, 0.02, rescale_zero_terminal_snr=True, min_alpha_cumprod=2.0**-24)
    assert ours.alphas_cumprod[-1] == theirs.alphas_cumprod[-1].item() == 2.0**-24
    np.testing.assert_allclose(ours.alphas_cumprod, theirs.alphas_cumprod.double().numpy(), rtol=6e-5)


@pytest.mark.parametrize("scheduler_class", [CogVideoXDDIMScheduler, CogVideoXDPMScheduler])
@pytest.mark.parametrize("is_rescaled", [False, True])
@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear"])
def test_the_snr_shift_equals_cogvideox(
    beta_schedule: BetaSchedule, scale: float, is_rescaled: bool, scheduler_class: type
) -> None:
    theirs = scheduler_class(
        beta_schedule=beta_schedule, snr_shift_scale=scale, rescale_betas_zero_snr=is_rescaled
    ).alphas_cumprod
    ours = DiffusionSchedule(beta_schedule, rescale_zero_terminal_snr=is_rescaled, snr_shift_scale=scale)
    rtol = 1e-9 if theirs.dtype == torch.float64 else 6e-5
    np.testing.assert_allclose(ours.alphas_cumprod, theirs.double().numpy(), rtol=rtol, atol=1e-8)


def test_the_snr_shift_divides_the_signal_to_noise_ratio() -> None:
    plain, shifted = DiffusionSchedule().alphas_cumprod, DiffusionSchedule(snr_shift_scale=3.0).alphas_cumprod
    np.testing.assert_allclose(shifted / (1 - shifted), plain / (1 - plain) / 3.0, rtol=1e-10)


@pytest.mark.parametrize("schedule", [DiffusionSchedule(), DiffusionSchedule(rescale_zero_terminal_snr=True)])
def test_diffusion_levels_preserve_variance_and_only_lose_signal(schedule: DiffusionSchedule) -> None:
    levels = schedule.levels(np.linspace(-1.0, 999.0, 4001))
    np.testing.assert_allclose(levels.alphas**2 + levels.sigmas**2, 1.0, rtol=1e-14)
    assert np.all(np.diff(levels.alphas) <= 0)
    assert (levels.alphas[0], levels.sigmas[0]) == (1.0, 0.0)


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
def test_flow_levels_share_one_unit_between_signal_and_noise(shift: float) -> None:
    levels = FlowSchedule(shift).levels(np.linspace(0.0, 1000.0, 41))
    np.testing.assert_allclose(levels.alphas + levels.sigmas, 1.0, rtol=1e-15)
    np.testing.assert_allclose(levels.sigmas, np.linspace(0.0, 1.0, 41), atol=1e-15)


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
def test_the_training_sigmas_of_a_flow_equal_diffusers(shift: float) -> None:
    ours = FlowSchedule(shift).shifted(np.arange(1000, 0, -1) / 1000)
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift).sigmas
    np.testing.assert_allclose(ours, theirs.double().numpy(), atol=2e-7)


@pytest.mark.parametrize("steps", STEP_COUNTS)
@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
def test_flow_timesteps_equal_diffusers_at_evenly_spaced_sigmas(shift: float, steps: int) -> None:
    """Pipelines call set_timesteps(sigmas=linspace(1, 1 / K, K))."""
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(sigmas=np.linspace(1.0, 1.0 / steps, steps).tolist())
    np.testing.assert_allclose(flow_timesteps(FlowSchedule(shift), steps), theirs.timesteps.double().numpy(), rtol=3e-7)


def timesteps_of(scheduler: Any, steps: int) -> Array:
    scheduler.set_timesteps(steps)
    return as_array(scheduler.timesteps.tolist())


@pytest.mark.parametrize("steps_offset", [0, 1])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [*STEP_COUNTS, 15, 25, 50, 1000])
def test_rounded_timesteps_equal_ddim(spacing: Spacing, steps: int, steps_offset: int) -> None:
    theirs = timesteps_of(DDIMScheduler(timestep_spacing=spacing, steps_offset=steps_offset), steps)
    np.testing.assert_array_equal(np.round(spaced_timesteps(spacing, steps, 1000, steps_offset)), theirs)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", STEP_COUNTS)
def test_unrounded_timesteps_equal_euler(spacing: Spacing, steps: int) -> None:
    theirs = timesteps_of(EulerDiscreteScheduler(timestep_spacing=spacing), steps)
    np.testing.assert_allclose(spaced_timesteps(spacing, steps), theirs, rtol=1e-7)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", STEP_COUNTS)
def test_timesteps_without_the_clean_end_equal_dpm_solver(spacing: Spacing, steps: int) -> None:
    """linspace and leading space K + 1 timesteps and leave the lowest to the final sigma."""
    theirs = timesteps_of(DPMSolverMultistepScheduler(timestep_spacing=spacing), steps)
    ours = spaced_timesteps(spacing, steps) if spacing == "trailing" else spaced_timesteps(spacing, steps + 1)[:-1]
    np.testing.assert_array_equal(np.round(ours), theirs)


@pytest.mark.parametrize("total", [2, 10, 500, 1000])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_spaced_timesteps_decrease_within_the_schedule(spacing: Spacing, total: int) -> None:
    for steps in range(1, total + 1):
        timesteps = spaced_timesteps(spacing, steps, total)
        assert len(timesteps) == steps
        assert np.all(np.diff(timesteps) < 0)
        assert timesteps[0] <= total - 1 and timesteps[-1] >= 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("beta_schedule", "cosine"),
        ("beta_schedule", ["linear"]),
        ("beta_start", 0.0),
        ("beta_start", "0.1"),
        ("beta_start", math.nan),
        ("beta_start", True),
        ("beta_end", 0.0001),
        ("beta_end", 1.0),
        ("beta_end", None),
        ("num_train_timesteps", 1),
        ("num_train_timesteps", 1000.0),
        ("num_train_timesteps", 10**12),
        ("rescale_zero_terminal_snr", "no"),
        ("rescale_zero_terminal_snr", 1),
        ("min_alpha_cumprod", -0.1),
        ("min_alpha_cumprod", 1.0),
        ("snr_shift_scale", 0.0),
        ("snr_shift_scale", math.inf),
        ("snr_shift_scale", "3"),
        ("snr_shift_scale", True),
    ],
)
def test_a_diffusion_schedule_refuses_bad_values(field: str, value: object) -> None:
    with pytest.raises(RecipeError) as caught:
        DiffusionSchedule(**{field: value})  # type: ignore[arg-type]
    assert str(caught.value).startswith(f"{field} is {value!r}")


@pytest.mark.parametrize(
    ("field", "value"),
    [("shift", 0), ("shift", math.inf), ("shift", math.nan), ("shift", "3"), ("num_train_timesteps", True)],
)
def test_a_flow_schedule_refuses_bad_values(field: str, value: object) -> None:
    with pytest.raises(RecipeError) as caught:
        FlowSchedule(**{field: value})  # type: ignore[arg-type]
    assert str(caught.value).startswith(f"{field} is {value!r}")


def test_an_unknown_spacing_is_refused_by_name() -> None:
    with pytest.raises(RecipeError, match="'karras'"):
        spaced_timesteps("karras", 4)  # type: ignore[arg-type]
