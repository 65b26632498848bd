"""Step tables sample as diffusers' schedulers do and obey the laws of their solvers.

Tests against diffusers run a scheduler's own `step` and a loop over table columns with the same pseudo model, and
compare the two trajectories step by step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from tdm_runtime.errors import RecipeError
from tdm_runtime.sampling.schedule import (
    Array,
    BetaSchedule,
    DiffusionSchedule,
    FlowSchedule,
    NoiseSchedule,
    Spacing,
    as_array,
    flow_timesteps,
    spaced_timesteps,
)
from tdm_runtime.sampling.solvers import DeterministicSolver, Solver
from tdm_runtime.sampling.step_table import COLUMNS, PredictionType, StepTable, build_step_table

# diffusers calls np.array() on torch tensors
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

Model = Callable[[Array, float], Array]
"""(latents, timestep) -> model output."""

BETA_SCHEDULES: tuple[BetaSchedule, ...] = get_args(BetaSchedule)
SPACINGS: tuple[Spacing, ...] = get_args(Spacing)
SOLVERS: tuple[Solver, ...] = get_args(DeterministicSolver)
NOISY_SOLVERS: tuple[Solver, ...] = ("renoise", "lcm", "tcd", "euler_ancestral")
DIFFUSION_PREDICTIONS: tuple[PredictionType, ...] = ("epsilon", "v_prediction", "sample")
SHIFTS = [1.0, 3.0, 6.0]
STEP_COUNTS = [*range(1, 9), 16]
TOLERANCE = 1e-5
SIGNAL_KEPT = 2.0**-24
"""Floor of alphas_cumprod that diffusers' Euler and DPM-Solver++ use for zero terminal SNR."""

NOISE: Array = np.random.default_rng(0).standard_normal((2, 3, 4))

every_step_count = pytest.mark.parametrize("steps", STEP_COUNTS)
every_spacing = pytest.mark.parametrize("spacing", SPACINGS)
every_solver = pytest.mark.parametrize("solver", SOLVERS)
every_beta_schedule = pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
every_diffusion_prediction = pytest.mark.parametrize("prediction_type", DIFFUSION_PREDICTIONS)


def pseudo_model(latents: Array, timestep: float) -> Array:
    """Return a smooth function of the latents that mixes positions, so that any error spreads."""
    mixed: Array = np.tanh(0.6 * latents - 0.3 * np.roll(latents, 1, axis=-1) + np.cos(timestep / 300.0))
    return mixed


def run(table: StepTable, model: Model, noise: Array) -> list[Array]:
    """Run the loop over a table. Return the start and the latents after every step."""
    x, previous = table.initial_scale * noise, np.zeros_like(noise)
    trajectory = [x]
    for t, p, q, a, b, c in zip(table.timesteps, table.p, table.q, table.a, table.b, table.c, strict=True):
        denoised = p * x + q * model(x, float(t))
        x, previous = a * x + b * denoised + c * previous, denoised
        trajectory.append(x)
    return trajectory


def run_diffusers(scheduler: Any, noise: Array) -> list[Array]:
    """Run the loop of a diffusers pipeline, in the scheduler's own coordinates."""
    x = torch.from_numpy(noise) * getattr(scheduler, "init_noise_sigma", 1.0)
    trajectory = [x.numpy()]
    for t in scheduler.timesteps:
        latents = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        output = torch.from_numpy(pseudo_model(latents.numpy(), float(t)))
        # DDIM indexes alphas_cumprod with an integer; the others look up the tensor.
        x = scheduler.step(output, int(t) if isinstance(scheduler, DDIMScheduler) else t, x).prev_sample
        trajectory.append(x.numpy())
    return trajectory


def with_schedule(scheduler: Any, schedule: DiffusionSchedule) -> Any:
    """Give a scheduler our alphas_cumprod in float64. Its own are float32 (test_schedule compares them)."""
    ours = torch.from_numpy(schedule.alphas_cumprod)
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), ours, rtol=1e-4, atol=1e-8)
    scheduler.alphas_cumprod = ours
    return scheduler


def set_timesteps(scheduler: Any, steps: int, sigmas: Array) -> None:
    """Let a scheduler set its timesteps, check its float32 sigmas, and replace them with float64 ones."""
    scheduler.set_timesteps(steps)
    torch.testing.assert_close(scheduler.sigmas.double(), torch.from_numpy(sigmas), rtol=1e-6, atol=1e-7)
    scheduler.sigmas = torch.from_numpy(sigmas)


def noise_to_signal(schedule: DiffusionSchedule, timesteps: Array) -> Array:
    """Return what diffusers calls the sigmas of a diffusion schedule."""
    levels = schedule.levels(timesteps)
    return levels.sigmas / levels.alphas


def assert_same_trajectory(ours: list[Array], theirs: list[Array]) -> None:
    """Assert that every step agrees to TOLERANCE, relative to the largest latent (diffusers rounds to float32)."""
    assert len(ours) == len(theirs)
    for step, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        error = np.abs(mine - other).max() / max(1.0, np.abs(other).max())
        assert error < TOLERANCE, f"after {step} steps: {error}"


# DDIM


def ddim_next_timesteps(timesteps: Array, final_timestep: float) -> Array:
    """Return where diffusers' DDIM steps land: at t - T // K, and at the final alpha if that is below 0."""
    landing = timesteps - 1000 // len(timesteps)
    return np.where(landing < 0, final_timestep, landing)


@every_step_count
@every_spacing
@every_diffusion_prediction
@every_beta_schedule
def test_ddim_equals_diffusers(
    beta_schedule: BetaSchedule, prediction_type: PredictionType, spacing: Spacing, steps: int
) -> None:
    assert_ddim(DiffusionSchedule(beta_schedule), prediction_type, spacing, steps)


@every_step_count
@every_spacing
@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@every_beta_schedule
def test_ddim_equals_diffusers_at_zero_terminal_snr(
    beta_schedule: BetaSchedule, prediction_type: PredictionType, spacing: Spacing, steps: int
) -> None:
    schedule = DiffusionSchedule(beta_schedule, rescale_zero_terminal_snr=True)
    assert_ddim(schedule, prediction_type, spacing, steps)


@every_step_count
@pytest.mark.parametrize("steps_offset", [0, 1])
@pytest.mark.parametrize("set_alpha_to_one", [False, True])
def test_ddim_equals_diffusers_with_the_settings_of_stable_diffusion(
    set_alpha_to_one: bool, steps_offset: int, steps: int
) -> None:
    """With set_alpha_to_one False the final alpha is that of timestep 0, so the last step ends slightly noisy."""
    assert_ddim(DiffusionSchedule(), "epsilon", "leading", steps, steps_offset, set_alpha_to_one)


def assert_ddim(
    schedule: DiffusionSchedule,
    prediction_type: PredictionType,
    spacing: Spacing,
    steps: int,
    steps_offset: int = 0,
    set_alpha_to_one: bool = True,
) -> None:
    theirs = with_schedule(
        DDIMScheduler(
            beta_schedule=schedule.beta_schedule,
            beta_start=schedule.beta_start,
            beta_end=schedule.beta_end,
            rescale_betas_zero_snr=schedule.rescale_zero_terminal_snr,
            prediction_type=prediction_type,
            timestep_spacing=spacing,
            steps_offset=steps_offset,
            set_alpha_to_one=set_alpha_to_one,
            clip_sample=False,
        ),
        schedule,
    )
    theirs.final_alpha_cumprod = torch.ones((), dtype=torch.float64) if set_alpha_to_one else theirs.alphas_cumprod[0]
    theirs.set_timesteps(steps)
    timesteps = np.round(spaced_timesteps(spacing, steps, 1000, steps_offset))
    landing = ddim_next_timesteps(timesteps, -1.0 if set_alpha_to_one else 0.0)
    table = build_step_table(schedule, prediction_type, "ddim", timesteps, next_timesteps=landing)
    assert_same_trajectory(run(table, pseudo_model, NOISE), run_diffusers(theirs, NOISE))


@pytest.mark.parametrize("steps", [1, 2, 4, 5, 8])
def test_trailing_ddim_lands_on_the_next_timestep_where_steps_divide_the_schedule(steps: int) -> None:
    timesteps = spaced_timesteps("trailing", steps)
    np.testing.assert_array_equal(ddim_next_timesteps(timesteps, -1.0), [*timesteps[1:], -1.0])


# Euler, diffusion: diffusers' latents are x / alpha


@every_step_count
@every_spacing
@every_diffusion_prediction
@every_beta_schedule
@pytest.mark.parametrize("is_rescaled", [False, True])
def test_euler_equals_diffusers(
    is_rescaled: bool, beta_schedule: BetaSchedule, prediction_type: PredictionType, spacing: Spacing, steps: int
) -> None:
    floor = SIGNAL_KEPT if is_rescaled else 0.0
    schedule = DiffusionSchedule(beta_schedule, rescale_zero_terminal_snr=is_rescaled, min_alpha_cumprod=floor)
    assert_euler(schedule, prediction_type, spacing, steps, steps_offset=0, final_sigmas_type="zero")


@every_step_count
@every_spacing
@pytest.mark.parametrize("final_sigmas_type", ["zero", "sigma_min"])
def test_euler_equals_diffusers_with_the_settings_of_stable_diffusion(
    final_sigmas_type: str, spacing: Spacing, steps: int
) -> None:
    assert_euler(DiffusionSchedule(), "epsilon", spacing, steps, steps_offset=1, final_sigmas_type=final_sigmas_type)


def assert_euler(
    schedule: DiffusionSchedule,
    prediction_type: PredictionType,
    spacing: Spacing,
    steps: int,
    steps_offset: int,
    final_sigmas_type: str,
) -> None:
    theirs = with_schedule(
        EulerDiscreteScheduler(
            beta_schedule=schedule.beta_schedule,
            beta_start=schedule.beta_start,
            beta_end=schedule.beta_end,
            rescale_betas_zero_snr=schedule.rescale_zero_terminal_snr,
            prediction_type=prediction_type,
            timestep_spacing=spacing,
            steps_offset=steps_offset,
            final_sigmas_type=final_sigmas_type,
        ),
        schedule,
    )
    timesteps = spaced_timesteps(spacing, steps, 1000, steps_offset)
    landing = np.append(timesteps[1:], -1.0 if final_sigmas_type == "zero" else 0.0)
    places = np.append(timesteps[:1], landing)
    set_timesteps(theirs, steps, noise_to_signal(schedule, places))
    # "leading" starts below T, where diffusers adds the missing variance. Otherwise it starts from noise alone.
    initial_scale = 1.0 if spacing == "leading" else float(schedule.levels(timesteps[:1]).sigmas[0])
    table = build_step_table(
        schedule, prediction_type, "euler", timesteps, next_timesteps=landing, initial_scale=initial_scale
    )
    scaled = [alpha * x for alpha, x in zip(schedule.levels(places).alphas, run_diffusers(theirs, NOISE), strict=True)]
    assert_same_trajectory(run(table, pseudo_model, NOISE), scaled)


# Euler, flow


def diffusers_flow_timesteps(schedule: FlowSchedule, steps: int) -> Array:
    """Return the timesteps of FlowMatchEulerDiscreteScheduler.set_timesteps(K).

    Its sigmas are evenly spaced down to the shifted 1 / T, then shifted again.
    """
    lowest = float(schedule.shifted(as_array([1 / 1000]))[0])
    return 1000.0 * schedule.shifted(np.linspace(1.0, lowest, steps))


@every_step_count
@pytest.mark.parametrize("shift", SHIFTS)
def test_euler_on_flows_equals_diffusers(shift: float, steps: int) -> None:
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    timesteps = diffusers_flow_timesteps(FlowSchedule(shift), steps)
    set_timesteps(theirs, steps, np.append(timesteps, 0.0) / 1000.0)
    table = build_step_table(FlowSchedule(shift), "flow_prediction", "euler", timesteps)
    assert_same_trajectory(run(table, pseudo_model, NOISE), run_diffusers(theirs, NOISE))


@every_step_count
@pytest.mark.parametrize("shift", SHIFTS)
def test_euler_on_flows_equals_diffusers_at_the_sigmas_of_pipelines(shift: float, steps: int) -> None:
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(sigmas=np.linspace(1.0, 1.0 / steps, steps).tolist())
    timesteps = flow_timesteps(FlowSchedule(shift), steps)
    table = build_step_table(FlowSchedule(shift), "flow_prediction", "euler", timesteps)
    assert_same_trajectory(run(table, pseudo_model, NOISE), run_diffusers(theirs, NOISE))


# DPM-Solver++ 2M


def dpm_solver_timesteps(spacing: Spacing, steps: int, steps_offset: int = 0) -> Array:
    """Return the timesteps of DPM-Solver++.

    linspace and leading space K + 1 timesteps and replace the lowest by the final sigma.
    """
    if spacing == "trailing":
        return spaced_timesteps(spacing, steps)
    return np.round(spaced_timesteps(spacing, steps + 1, 1000, steps_offset)[:-1])


@every_step_count
@every_spacing
@every_diffusion_prediction
@every_beta_schedule
@pytest.mark.parametrize("is_rescaled", [False, True])
def test_dpm_solver_equals_diffusers(
    is_rescaled: bool, beta_schedule: BetaSchedule, prediction_type: PredictionType, spacing: Spacing, steps: int
) -> None:
    floor = SIGNAL_KEPT if is_rescaled else 0.0
    schedule = DiffusionSchedule(beta_schedule, rescale_zero_terminal_snr=is_rescaled, min_alpha_cumprod=floor)
    assert_dpm_solver(schedule, prediction_type, spacing, steps, steps_offset=0, final_sigmas_type="zero")


@every_step_count
@every_spacing
@pytest.mark.parametrize("final_sigmas_type", ["zero", "sigma_min"])
def test_dpm_solver_equals_diffusers_with_the_settings_of_stable_diffusion(
    final_sigmas_type: str, spacing: Spacing, steps: int
) -> None:
    assert_dpm_solver(DiffusionSchedule(), "epsilon", spacing, steps, 1, final_sigmas_type)


def assert_dpm_solver(
    schedule: DiffusionSchedule,
    prediction_type: PredictionType,
    spacing: Spacing,
    steps: int,
    steps_offset: int,
    final_sigmas_type: str,
) -> None:
    theirs = with_schedule(
        DPMSolverMultistepScheduler(
            algorithm_type="dpmsolver++",
            solver_order=2,
            solver_type="midpoint",
            beta_schedule=schedule.beta_schedule,
            beta_start=schedule.beta_start,
            beta_end=schedule.beta_end,
            rescale_betas_zero_snr=schedule.rescale_zero_terminal_snr,
            prediction_type=prediction_type,
            timestep_spacing=spacing,
            steps_offset=steps_offset,
            final_sigmas_type=final_sigmas_type,
            euler_at_final=steps >= 15,  # as fewer steps end by default; a table's last step is of first order
        ),
        schedule,
    )
    timesteps = dpm_solver_timesteps(spacing, steps, steps_offset)
    landing = np.append(timesteps[1:], -1.0 if final_sigmas_type == "zero" else 0.0)
    set_timesteps(theirs, steps, noise_to_signal(schedule, np.append(timesteps[:1], landing)))
    table = build_step_table(schedule, prediction_type, "dpmsolver++", timesteps, next_timesteps=landing)
    assert_same_trajectory(run(table, pseudo_model, NOISE), run_diffusers(theirs, NOISE))


@every_step_count
@pytest.mark.parametrize("shift", SHIFTS)
def test_dpm_solver_on_flows_equals_diffusers(shift: float, steps: int) -> None:
    """diffusers starts at sigma 0.999 before the shift and cuts the timesteps to whole numbers, but not the sigmas."""
    theirs = DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=shift,
    )
    schedule = FlowSchedule(shift)
    sigmas = schedule.shifted(1.0 - np.linspace(1.0, 0.001, steps + 1))[::-1].copy()
    set_timesteps(theirs, steps, sigmas)
    timesteps = np.trunc(1000.0 * sigmas[:-1])
    np.testing.assert_array_equal(timesteps, theirs.timesteps)
    table = build_step_table(schedule, "flow_prediction", "dpmsolver++", timesteps, sigmas=sigmas)
    assert_same_trajectory(run(table, pseudo_model, NOISE), run_diffusers(theirs, NOISE))


# Laws


def schedule_of(prediction_type: PredictionType) -> NoiseSchedule:
    return FlowSchedule(3.0) if prediction_type == "flow_prediction" else DiffusionSchedule()


def table_of(prediction_type: PredictionType, solver: Solver, steps: int) -> StepTable:
    schedule = schedule_of(prediction_type)
    if isinstance(schedule, FlowSchedule):
        timesteps = flow_timesteps(schedule, steps)
    else:
        timesteps = spaced_timesteps("trailing", steps)
    return build_step_table(schedule, prediction_type, solver, timesteps)


every_prediction = pytest.mark.parametrize("prediction_type", get_args(PredictionType))


@every_solver
@every_prediction
def test_one_step_returns_the_denoised(prediction_type: PredictionType, solver: Solver) -> None:
    table = table_of(prediction_type, solver, 1)
    assert (table.a[0], table.b[0], table.c[0]) == (0.0, 1.0, 0.0)
    denoised = table.p[0] * NOISE + table.q[0] * pseudo_model(NOISE, float(table.timesteps[0]))
    np.testing.assert_array_equal(run(table, pseudo_model, NOISE)[-1], denoised)


@every_step_count
@every_solver
@every_prediction
def test_the_last_step_returns_the_last_denoised(prediction_type: PredictionType, solver: Solver, steps: int) -> None:
    table = table_of(prediction_type, solver, steps)
    assert (table.a[-1], table.b[-1], table.c[-1]) == (0.0, 1.0, 0.0)


@every_step_count
@every_solver
@every_prediction
def test_with_a_linear_model_the_sampler_is_linear(prediction_type: PredictionType, solver: Solver, steps: int) -> None:
    table = table_of(prediction_type, solver, steps)

    def sample(noise: Array) -> Array:
        return run(table, lambda x, t: 0.4 * x - 0.2 * np.roll(x, 1, axis=-1), noise)[-1]

    other = np.roll(NOISE, 1, axis=0) ** 2
    np.testing.assert_allclose(
        sample(2.0 * NOISE - 3.0 * other), 2.0 * sample(NOISE) - 3.0 * sample(other), rtol=1e-9, atol=1e-9
    )


def perfect_model(schedule: NoiseSchedule, prediction_type: PredictionType, x_0: Array) -> Model:
    """Return a model that knows x_0 and predicts it in the given prediction type."""

    def model(x: Array, timestep: float) -> Array:
        level = schedule.levels(as_array([timestep]))
        alpha, sigma = level.alphas[0], level.sigmas[0]
        epsilon = (x - alpha * x_0) / sigma
        outputs: dict[str, Array] = {
            "epsilon": epsilon,
            "v_prediction": alpha * epsilon - sigma * x_0,
            "flow_prediction": epsilon - x_0,
            "sample": x_0,
        }
        return outputs[prediction_type]

    return model


falling_timesteps = st.sets(st.integers(1, 999), min_size=1, max_size=8).map(lambda ts: sorted(ts, reverse=True))


@every_solver
@every_prediction
@settings(deadline=None)
@given(timesteps=falling_timesteps)
def test_a_perfect_denoiser_lands_on_x_0(
    prediction_type: PredictionType, solver: Solver, timesteps: list[float]
) -> None:
    """It holds for any start and any decreasing timesteps, along alpha_t x_0 + sigma_t noise."""
    schedule = schedule_of(prediction_type)
    x_0, noise = np.sin(NOISE), NOISE
    start = schedule.levels(as_array(timesteps[:1]))
    table = build_step_table(schedule, prediction_type, solver, as_array(timesteps))
    model = perfect_model(schedule, prediction_type, x_0)
    trajectory = run(table, model, start.alphas * x_0 + start.sigmas * noise)
    levels = schedule.levels(as_array([*timesteps, -1.0]))
    for x, alpha, sigma in zip(trajectory, levels.alphas, levels.sigmas, strict=True):
        np.testing.assert_allclose(x, alpha * x_0 + sigma * noise, atol=1e-9)
    np.testing.assert_allclose(trajectory[-1], x_0, atol=1e-12)


@every_step_count
def test_dpm_solver_at_full_noise_starts_with_two_first_order_steps(steps: int) -> None:
    """Without signal at the start the first log-SNR step is infinite, so the second-order term vanishes."""
    schedule = DiffusionSchedule(rescale_zero_terminal_snr=True)
    table = build_step_table(schedule, "v_prediction", "dpmsolver++", spaced_timesteps("trailing", steps))
    ddim = build_step_table(schedule, "v_prediction", "ddim", spaced_timesteps("trailing", steps))
    for name in ("a", "b", "c"):
        np.testing.assert_allclose(getattr(table, name)[:2], getattr(ddim, name)[:2], atol=1e-15)


@pytest.mark.parametrize("spread", [0.5, 2.0])
@pytest.mark.parametrize("prediction_type", ["v_prediction", "flow_prediction"])
@pytest.mark.parametrize(("solver", "order"), [("ddim", 1.0), ("euler", 1.0), ("dpmsolver++", 2.0)])
def test_errors_fall_with_the_order_of_the_solver(
    solver: Solver, order: float, prediction_type: PredictionType, spread: float
) -> None:
    """For data distributed as N(0, spread^2) the exact solution keeps x / deviation(t) constant."""
    schedule = schedule_of(prediction_type)

    def deviation(timestep: float) -> float:
        level = schedule.levels(as_array([timestep]))
        return float(np.hypot(level.alphas[0] * spread, level.sigmas[0]))

    def model(x: Array, timestep: float) -> Array:
        """Predict E[x_0 | x_t]."""
        alpha = schedule.levels(as_array([timestep])).alphas[0]
        x_0 = alpha * spread**2 / deviation(timestep) ** 2 * x
        return perfect_model(schedule, prediction_type, x_0)(x, timestep)

    exact = deviation(200.0) / deviation(800.0) * NOISE
    errors = []
    for steps in (8, 16, 32, 64):
        timesteps = np.linspace(800.0, 200.0, steps + 1)
        table = build_step_table(schedule, prediction_type, solver, timesteps[:-1], next_timesteps=timesteps[1:])
        errors.append(np.abs(run(table, model, NOISE)[-1] - exact).max())
    np.testing.assert_allclose(np.log2(errors[:-1]) - np.log2(errors[1:]), order, atol=0.3)


@pytest.mark.parametrize("column", COLUMNS)
def test_columns_are_read_only(column: str) -> None:
    table = table_of("epsilon", "ddim", 4)
    with pytest.raises(ValueError, match="read-only"):
        getattr(table, column)[0] = 0.0


def test_the_timesteps_of_the_caller_stay_writable() -> None:
    timesteps = spaced_timesteps("trailing", 4)
    build_step_table(DiffusionSchedule(), "epsilon", "ddim", timesteps)
    timesteps[0] = 0.0


# Refusals


@pytest.mark.parametrize(
    ("timesteps", "named"),
    [
        ([249.0, 499.0, 749.0, 999.0], "[249.0, 499.0, 749.0, 999.0]"),
        ([499.0, 499.0], "[499.0, 499.0]"),
        ([], "[]"),
        ([[999.0, 499.0]], "[[999.0, 499.0]]"),
        ([1000.0, 499.0], "0..999: [1000.0, 499.0]"),
        ([999.0, -1.0], "0..999: [999.0, -1.0]"),
        ([float("nan")], "[nan]"),
        ([float("inf"), 499.0], "[inf, 499.0]"),
    ],
)
def test_timesteps_that_do_not_decrease_within_the_schedule_are_refused(timesteps: list[float], named: str) -> None:
    with pytest.raises(RecipeError) as caught:
        build_step_table(DiffusionSchedule(), "epsilon", "ddim", as_array(timesteps))
    assert "timesteps" in str(caught.value) and named in str(caught.value)


@pytest.mark.parametrize("landing", [[499.0], [999.0, 999.0], [499.0, float("nan")]])
def test_a_step_that_lands_above_its_start_is_refused(landing: list[float]) -> None:
    with pytest.raises(RecipeError, match="next_timesteps") as caught:
        build_step_table(
            DiffusionSchedule(), "epsilon", "ddim", as_array([999.0, 499.0]), next_timesteps=as_array(landing)
        )
    assert str(landing) in str(caught.value)


@every_solver
@pytest.mark.parametrize(
    ("schedule", "prediction_type"),
    [(DiffusionSchedule(), "flow_prediction"), *((FlowSchedule(), p) for p in DIFFUSION_PREDICTIONS)],
)
def test_a_prediction_type_that_does_not_fit_the_schedule_is_refused(
    schedule: NoiseSchedule, prediction_type: PredictionType, solver: Solver
) -> None:
    with pytest.raises(RecipeError, match=f"'{prediction_type}' does not fit a {type(schedule).__name__}"):
        build_step_table(schedule, prediction_type, solver, as_array([500.0]))


@every_solver
@every_beta_schedule
def test_epsilon_at_zero_terminal_snr_is_refused(beta_schedule: BetaSchedule, solver: Solver) -> None:
    schedule = DiffusionSchedule(beta_schedule, rescale_zero_terminal_snr=True)
    with pytest.raises(RecipeError, match="'epsilon' is undefined at timestep 999"):
        build_step_table(schedule, "epsilon", solver, spaced_timesteps("trailing", 4))
    build_step_table(schedule, "epsilon", solver, spaced_timesteps("leading", 4))


@every_solver
def test_a_step_from_the_clean_end_is_refused(solver: Solver) -> None:
    with pytest.raises(RecipeError, match="no step can start at timestep 0,"):
        build_step_table(FlowSchedule(), "flow_prediction", solver, as_array([1000.0, 0.0]))


def test_an_unknown_solver_or_prediction_type_is_refused_by_name() -> None:
    timesteps = as_array([500.0])
    with pytest.raises(RecipeError, match="solver 'heun' is unknown"):
        build_step_table(DiffusionSchedule(), "epsilon", "heun", timesteps)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="prediction_type 'score' is unknown"):
        build_step_table(DiffusionSchedule(), "score", "ddim", timesteps)  # type: ignore[arg-type]
