"""Step tables with fresh noise sample as diffusers' schedulers do, from the same generator.

diffusers' schedulers run in float64 with our alphas_cumprod where they allow it; the sigmas of FlowMatchEuler and of
SCM are float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    SCMScheduler,
    TCDScheduler,
)
from torch import Tensor

from tdm_runtime.errors import RecipeError
from tdm_runtime.sampling.noise import SeedNoise
from tdm_runtime.sampling.sampler import apply_step, gather_rows, solve
from tdm_runtime.sampling.schedule import (
    Array,
    DiffusionSchedule,
    FlowSchedule,
    NoiseSchedule,
    Spacing,
    TrigFlowSchedule,
    as_array,
    flow_timesteps,
    spaced_timesteps,
)
from tdm_runtime.sampling.solvers import Solver
from tdm_runtime.sampling.step_table import COLUMNS, PredictionType, StepTable, build_step_table
from tests.tdm_runtime.sampling.test_step_table import assert_same_trajectory, noise_to_signal, with_schedule

# diffusers calls np.array() on torch tensors
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SEED = 11
SHAPE = (1, 4, 6, 6)
every_step_count = pytest.mark.parametrize("steps", [*range(1, 9), 16])
every_diffusion_prediction = pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])


def pseudo_model(latents: Tensor, timestep: float) -> Tensor:
    """Return a smooth function of the latents that mixes positions, so that any error spreads."""
    return torch.tanh(0.6 * latents - 0.3 * latents.roll(1, -1) + np.cos(timestep / 300.0))


def ours(table: StepTable, draws_a_step: int = 1) -> list[Array]:
    """Return the start and the latents after every step, in float64."""
    noise = SeedNoise(SEED, SHAPE, draws_a_step=draws_a_step)
    x = table.initial_scale * noise.initial().double()
    before = previous = torch.zeros(SHAPE, dtype=torch.float64)
    trajectory = [x.numpy()]
    columns = (getattr(table, name) for name in COLUMNS)
    for j, (t, p, q, a, b, c, d, e) in enumerate(zip(*columns, strict=True)):
        denoised = p * x + q * pseudo_model(x, float(t))
        x = a * x + b * denoised + c * previous + (d * noise.of_step(j).double() if d else 0.0) + e * before
        before, previous = previous, denoised
        trajectory.append(x.numpy())
    return trajectory


def theirs(scheduler: Any, timesteps: list[Any], step: Callable[..., Any] | None = None, **options: Any) -> list[Array]:
    """Run the loop of a diffusers pipeline: one generator draws the initial latents and every noise."""
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(SHAPE, generator=generator).double() * scheduler.init_noise_sigma
    trajectory = [x.numpy()]
    for t in timesteps:
        latents = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        output = pseudo_model(latents, float(t))
        with float32_draws():
            x = scheduler.step(output, t, x, generator=generator, return_dict=False, **options)[0].double()
        trajectory.append(x.numpy())
    return trajectory


class float32_draws:
    """Makes diffusers draw float32 as its pipelines do, though this test's latents are float64."""

    def __enter__(self) -> None:
        self.randn = torch.randn
        torch.randn = lambda *shape, dtype=None, **rest: self.randn(*shape, dtype=torch.float32, **rest).to(dtype)

    def __exit__(self, *_: object) -> None:
        torch.randn = self.randn


@every_step_count
@pytest.mark.parametrize("timestep_scaling", [1.0, 10.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_lcm_equals_diffusers(prediction_type: PredictionType, timestep_scaling: float, steps: int) -> None:
    schedule = DiffusionSchedule()
    scheduler = with_schedule(
        LCMScheduler(prediction_type=prediction_type, timestep_scaling=timestep_scaling), schedule
    )
    scheduler.set_timesteps(steps)
    timesteps = as_array(scheduler.timesteps.tolist())
    table = build_step_table(schedule, prediction_type, "lcm", timesteps, timestep_scaling=timestep_scaling)
    assert_same_trajectory(ours(table), theirs(scheduler, list(scheduler.timesteps)))


@pytest.mark.parametrize("timesteps", [[999, 749, 499, 249], [399]])
def test_lcm_equals_diffusers_at_the_timesteps_of_dmd2(timesteps: list[int]) -> None:
    schedule = DiffusionSchedule()
    scheduler = with_schedule(LCMScheduler(), schedule)
    scheduler.set_timesteps(timesteps=timesteps)
    table = build_step_table(schedule, "epsilon", "lcm", as_array(timesteps))
    assert_same_trajectory(ours(table), theirs(scheduler, list(scheduler.timesteps)))


@every_step_count
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_tcd_equals_diffusers(prediction_type: PredictionType, eta: float, steps: int) -> None:
    schedule = DiffusionSchedule()
    scheduler = with_schedule(TCDScheduler(prediction_type=prediction_type), schedule)
    scheduler.set_timesteps(steps)
    timesteps = as_array(scheduler.timesteps.tolist())
    table = build_step_table(schedule, prediction_type, "tcd", timesteps, eta=eta)
    assert_same_trajectory(ours(table), theirs(scheduler, list(scheduler.timesteps), eta=eta))


@every_step_count
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@every_diffusion_prediction
def test_euler_ancestral_equals_diffusers(prediction_type: PredictionType, spacing: Spacing, steps: int) -> None:
    schedule = DiffusionSchedule("scaled_linear")
    scheduler = with_schedule(
        EulerAncestralDiscreteScheduler(
            beta_start=schedule.beta_start,
            beta_end=schedule.beta_end,
            beta_schedule="scaled_linear",
            prediction_type=prediction_type,
            timestep_spacing=spacing,
            steps_offset=1,
        ),
        schedule,
    )
    scheduler.set_timesteps(steps)
    timesteps = spaced_timesteps(spacing, steps, 1000, 1)
    np.testing.assert_allclose(scheduler.timesteps, timesteps, rtol=1e-6)
    places = np.append(timesteps, -1.0)
    scheduler.sigmas = torch.from_numpy(noise_to_signal(schedule, places))
    start = 1.0 if spacing == "leading" else "sigma"
    table = build_step_table(schedule, prediction_type, "euler_ancestral", timesteps, initial_scale=start)
    scaled = schedule.levels(places).alphas
    trajectory = theirs(scheduler, list(scheduler.timesteps))
    assert_same_trajectory(ours(table), [alpha * x for alpha, x in zip(scaled, trajectory, strict=True)])


@every_step_count
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_renoise_equals_stochastic_flow_match_euler(shift: float, steps: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift, stochastic_sampling=True)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / steps, steps).tolist())
    scheduler.init_noise_sigma = 1.0
    table = build_step_table(
        FlowSchedule(shift), "flow_prediction", "renoise", flow_timesteps(FlowSchedule(shift), steps)
    )
    assert_same_trajectory(ours(table), theirs(scheduler, list(scheduler.timesteps)))


@every_step_count
@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_renoise_on_trigflow_equals_scm(sigma_data: float, steps: int) -> None:
    """SANA-Sprint's scheduler works in the data's units; ours in units of its standard deviation."""
    scheduler = SCMScheduler(sigma_data=sigma_data)
    scheduler.set_timesteps(steps, intermediate_timesteps=1.3 if steps == 2 else None)
    angles = [1.5708, 1.3] if steps == 2 else np.linspace(1.5708, 0.0, steps + 1)[:-1]
    np.testing.assert_allclose(scheduler.timesteps[:-1], angles, rtol=1e-6)
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(SHAPE, generator=generator).double() * sigma_data
    trajectory = [x.numpy() / sigma_data]
    for t in scheduler.timesteps[:-1].double():
        output = sigma_data * pseudo_model(x / sigma_data, float(t))
        x = scheduler.step(output, t.float(), x, generator=generator, return_dict=False)[0].double()
        trajectory.append(x.numpy() / sigma_data)
    table = build_step_table(TrigFlowSchedule(), "v_prediction", "renoise", as_array(angles))
    assert_same_trajectory(ours(table), trajectory)


# Laws

SOLVER_TABLES: list[tuple[Solver, NoiseSchedule, PredictionType]] = [
    ("lcm", DiffusionSchedule(), "epsilon"),
    ("renoise", DiffusionSchedule(), "epsilon"),
    ("tcd", DiffusionSchedule(), "epsilon"),
    ("euler_ancestral", DiffusionSchedule(), "epsilon"),
    ("renoise", FlowSchedule(), "flow_prediction"),
    ("renoise", TrigFlowSchedule(), "v_prediction"),
]
every_noisy_solver = pytest.mark.parametrize(("solver", "schedule", "prediction_type"), SOLVER_TABLES)


def timesteps_of(schedule: NoiseSchedule, steps: int) -> Array:
    if isinstance(schedule, DiffusionSchedule):
        return spaced_timesteps("trailing", steps)
    return schedule.max_timestep * (1.0 - np.arange(steps) / steps)


@every_noisy_solver
@every_step_count
def test_every_step_lands_on_the_signal_and_noise_of_its_level(
    solver: Solver, schedule: NoiseSchedule, prediction_type: PredictionType, steps: int
) -> None:
    """With the true x_0: alpha a + b = alpha', and the kept and the fresh noise add up to sigma'."""
    timesteps = timesteps_of(schedule, steps)
    table = build_step_table(schedule, prediction_type, solver, timesteps, eta=0.4 if solver == "tcd" else 0.0)
    end = -1.0 if isinstance(schedule, DiffusionSchedule) and solver != "tcd" else 0.0
    level, landing = schedule.levels(timesteps), schedule.levels(np.append(timesteps[1:], end))
    np.testing.assert_allclose(table.a * level.alphas + table.b, landing.alphas, atol=1e-12)
    np.testing.assert_allclose(np.hypot(table.a * level.sigmas, table.d), landing.sigmas, atol=1e-12)
    assert table.d[-1] == 0.0 and np.all(table.d[:-1] > 0.0)


def test_tcd_without_noise_is_ddim_to_timestep_zero() -> None:
    timesteps = spaced_timesteps("trailing", 4)
    tcd = build_step_table(DiffusionSchedule(), "epsilon", "tcd", timesteps)
    ddim = build_step_table(
        DiffusionSchedule(), "epsilon", "ddim", timesteps, next_timesteps=np.append(timesteps[1:], 0.0)
    )
    np.testing.assert_array_equal(tcd.rows, ddim.rows)


@every_noisy_solver
def test_solve_takes_the_noise_of_each_step(
    solver: Solver, schedule: NoiseSchedule, prediction_type: PredictionType
) -> None:
    table = build_step_table(schedule, prediction_type, solver, timesteps_of(schedule, 4))
    noise = SeedNoise(SEED, SHAPE)
    asked: list[int] = []

    def step_noise(step_index: int) -> Tensor:
        asked.append(step_index)
        return noise.of_step(step_index)

    steps = list(solve(table, noise.initial(), lambda x, t: pseudo_model(x, float(t[0])), step_noise))
    assert asked == np.flatnonzero(table.d).tolist()
    for (latents, _), expected in zip(steps, ours(table)[1:], strict=True):
        np.testing.assert_allclose(latents, expected, atol=1e-4)


def test_a_batch_of_all_solvers_is_bit_equal_to_each_sample_alone() -> None:
    """One fused update serves samples that draw noise and samples that draw none."""
    timesteps = spaced_timesteps("trailing", 4)
    solvers: list[Solver] = ["ddim", "renoise", "dpmsolver++", "tcd", "euler_ancestral", "lcm", "sde-dpmsolver++"]
    tables = [build_step_table(DiffusionSchedule(), "epsilon", s, timesteps, eta=0.5) for s in [*solvers, "unipc"]]
    draw = torch.Generator().manual_seed(0)
    x, output, previous, noise, before = torch.randn(5, len(tables), 4, 6, 6, generator=draw)
    rows = gather_rows([(table, 2) for table in tables], torch.device("cpu"))
    # a sample that draws none has its latents in the place of the noise, as the engine puts them
    placed = torch.where((rows[:, 6] != 0).view(-1, 1, 1, 1), noise, x)
    batched = apply_step(rows, x, output, previous, placed, before)
    assert tables[-1].e[2] != 0
    for n, table in enumerate(tables):
        one = slice(n, n + 1)
        alone = apply_step(
            rows[one],
            x[one],
            output[one],
            previous[one] if table.c[2] else None,
            noise[one] if table.d[2] else None,
            before[one] if table.e[2] else None,
        )
        for mine, other in zip(batched, alone, strict=True):
            assert torch.equal(mine[one], other)


def test_solve_without_step_noise_refuses_a_table_that_takes_some() -> None:
    table = build_step_table(FlowSchedule(), "flow_prediction", "renoise", as_array([1000.0, 500.0]))
    with pytest.raises(ValueError, match="give step_noise"):
        next(solve(table, torch.zeros(SHAPE), lambda x, t: x))


@pytest.mark.parametrize("solver", ["lcm", "tcd", "euler_ancestral"])
def test_solvers_of_diffusion_schedules_refuse_flows_by_name(solver: Solver) -> None:
    with pytest.raises(RecipeError, match=f"solver '{solver}' does not fit a FlowSchedule"):
        build_step_table(FlowSchedule(), "flow_prediction", solver, as_array([1000.0]))


def test_trigflow_takes_v_prediction_only() -> None:
    with pytest.raises(RecipeError, match="'epsilon' does not fit a TrigFlowSchedule; use v_prediction"):
        build_step_table(TrigFlowSchedule(), "epsilon", "renoise", as_array([1.5]))


@pytest.mark.parametrize("sigmas", [[0.5, 0.7, 0.0], [0.5, 0.2], [0.5, 0.2, -0.1], [0.5, 0.5, 0.0], [1.5, 0.5, 0.0]])
def test_sigmas_that_do_not_fall_within_the_schedule_are_refused(sigmas: list[float]) -> None:
    with pytest.raises(RecipeError, match="sigmas of") as caught:
        build_step_table(FlowSchedule(), "flow_prediction", "euler", as_array([999.0, 500.0]), sigmas=as_array(sigmas))
    assert str(sigmas[0]) in str(caught.value)
