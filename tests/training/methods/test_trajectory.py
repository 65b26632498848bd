"""Trajectories against known answers: places, levels, DDIM and DPM-Solver++ by hand, rollouts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from tdm_runtime.errors import RecipeError
from tdm_runtime.families.conditioning import Conditioning
from tdm_runtime.sampling.schedule import DiffusionSchedule, FlowSchedule
from tdm_runtime.sampling.step_table import PredictionType
from tests.training.methods.known import (
    CONFIG,
    COORDINATES,
    SHAPE,
    STUDENT,
    batch_of,
    column,
    known,
    levels,
    method_of,
    normal,
    with_renoise,
)
from training.methods.trajectory import (
    Coordinates,
    Places,
    advance,
    build_trajectories,
    draw_places,
    level_columns,
    places_at,
    roll_out,
    sample,
)
from training.run.distill import trajectories_of

TRAJECTORIES = trajectories_of(CONFIG, COORDINATES)
PROMPTS = Conditioning(torch.tensor([0.3, -0.2, 0.5, 0.1]).view(4, 1, 1))
FLOW = Coordinates(FlowSchedule(shift=3.0), "flow_prediction")


def student(x: Tensor, timesteps: Tensor, conditioning: Conditioning, k: Tensor | None) -> Tensor:
    return known(STUDENT, x, timesteps, conditioning, k)


def ddim(x: Tensor, x_0: Tensor, start: Tensor, end: Tensor) -> Tensor:
    (alpha, sigma), (alpha_end, sigma_end) = levels(start), levels(end)
    return alpha_end * x_0 + sigma_end * (x - alpha * x_0) / sigma


# ---- levels and draws ----------------------------------------------------------------------------


def test_numbers_become_float32_columns() -> None:
    found = level_columns(np.array([1.0, 2.0, 3.0, 4.0])[::2], torch.zeros(2, 3, 4, 5, 6))
    assert found.shape == (2, 1, 1, 1, 1) and found.dtype == torch.float32 and found.flatten().tolist() == [1.0, 3.0]
    assert level_columns(np.array([1.0]), torch.zeros(1, 2, device="meta")).device.type == "meta"


def test_levels_are_the_schedules_and_the_clean_end_has_no_noise() -> None:
    timesteps = torch.tensor([999.0, 500.0, COORDINATES.clean_end])
    for found, expected in zip(COORDINATES.levels(timesteps, torch.zeros(3, *SHAPE)), levels(timesteps), strict=True):
        torch.testing.assert_close(found, expected)
    alpha, sigma = FLOW.levels(torch.tensor([FLOW.clean_end, 250.0]), torch.zeros(2, 1))
    assert (alpha.flatten().tolist(), sigma.flatten().tolist()) == ([1.0, 0.75], [0.0, 0.25])


def test_a_kernel_starts_at_m_and_ends_at_tau() -> None:
    tau, m = torch.tensor([700.0, 300.0]), torch.tensor([400.0, -1.0])
    kernel = COORDINATES.kernel(tau, m, torch.zeros(2, *SHAPE))
    found = (kernel.alpha_tau, kernel.sigma_tau, kernel.alpha_m, kernel.sigma_m)
    for level, by_hand in zip(found, (*levels(tau), *levels(m)), strict=True):
        torch.testing.assert_close(level, by_hand)


def test_a_clean_estimate_is_float32() -> None:
    v = Coordinates(DiffusionSchedule(), "v_prediction")
    x, output, timesteps = normal(2, *SHAPE, seed=0), normal(2, *SHAPE, seed=1), torch.tensor([700.0, 20.0])
    alpha, sigma = levels(timesteps)
    clean = v.to_clean(x.bfloat16(), output.bfloat16(), timesteps)
    assert clean.dtype == torch.float32
    torch.testing.assert_close(clean, alpha * x.bfloat16().float() - sigma * output.bfloat16().float())


def test_whole_timesteps_are_drawn_uniformly_from_above_low_to_high() -> None:
    low, high = torch.full((30_000,), 4.0, dtype=torch.float64), torch.full((30_000,), 7.0, dtype=torch.float64)
    drawn = COORDINATES.draw_between(low, high, torch.Generator().manual_seed(0))
    shares = {t: float((drawn == t).float().mean()) for t in (5.0, 6.0, 7.0)}
    assert shares == {t: pytest.approx(1 / 3, abs=0.01) for t in (5.0, 6.0, 7.0)}


def test_flow_timesteps_are_drawn_between_the_ends_uniformly_before_the_shift() -> None:
    """Unshifted ends 0.2 and 0.6: a third of the draws is above unshifted 0.2 + 0.4 * 2 / 3."""
    schedule = FLOW.schedule
    assert isinstance(schedule, FlowSchedule)
    ends = schedule.shifted(np.array([0.2, 0.6])) * 1000
    low, high = (torch.full((30_000,), end, dtype=torch.float64) for end in ends)
    drawn = schedule.unshifted(FLOW.draw_between(low, high, torch.Generator().manual_seed(0)).numpy() / 1000)
    assert drawn.min() > 0.2 and drawn.max() <= 0.6 + 1e-12
    assert np.quantile(drawn, [0.0, 1 / 3, 2 / 3, 1.0]) == pytest.approx([0.2, 1 / 3, 0.2 + 0.8 / 3, 0.6], abs=0.01)
    again = schedule.unshifted(FLOW.draw_between(low, high, torch.Generator().manual_seed(0)).numpy() / 1000)
    assert np.array_equal(drawn, again)


# ---- places --------------------------------------------------------------------------------------


def test_places_have_both_ends_of_each_samples_step() -> None:
    places = places_at(TRAJECTORIES, torch.tensor([4, 4, 1, 2]), torch.tensor([0, 3, 0, 1]))
    assert places.timestep.tolist() == [999, 249, 999, 499] and places.timestep.dtype == torch.float64
    assert places.next_timestep.tolist() == [749, -1, -1, -1]
    picked = places[torch.tensor([1, 3])]
    assert (picked.step_counts.tolist(), picked.row.tolist()) == ([4, 2], [3, 1])
    assert (picked.timestep.tolist(), picked.next_timestep.tolist()) == ([249, 499], [-1, -1])
    first = places.at_row(0, TRAJECTORIES)
    assert first.step_counts.tolist() == [4, 4, 1, 2] and first.next_timestep.tolist() == [749, 749, -1, 499]
    assert TRAJECTORIES.ends(2) == [999, 499, -1] and TRAJECTORIES.step_counts == (1, 2, 3, 4)


def test_k_is_drawn_uniformly_and_so_is_the_step_of_each_k() -> None:
    trajectories = trajectories_of(replace(CONFIG, step_counts=(4, 1)), COORDINATES)
    assert trajectories.step_counts == (1, 4)
    places = draw_places(trajectories, 8000, torch.Generator().manual_seed(0))
    of_four = places.row[places.step_counts == 4]
    assert len(places.row) == 8000 and len(of_four) == pytest.approx(4000, rel=0.05)
    assert of_four.bincount().tolist() == pytest.approx([1000] * 4, rel=0.1)
    first, again, other = (draw_places(trajectories, 50, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first.row, again.row) and torch.equal(first.step_counts, again.step_counts)
    assert not torch.equal(first.row, other.row) and not torch.equal(first.step_counts, other.step_counts)


def test_a_solver_with_fresh_noise_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"solver is 'renoise'; training rolls out by ddim, "):
        build_trajectories(COORDINATES, "renoise", {1: (999.0,)})


# ---- steps and rollouts --------------------------------------------------------------------------


@pytest.mark.parametrize("with_k", [True, False])
def test_a_step_is_ddims(with_k: bool) -> None:
    places = places_at(TRAJECTORIES, torch.tensor([4, 4, 3, 1]), torch.tensor([0, 3, 1, 0]))
    x, k = normal(4, *SHAPE, seed=0), places.step_counts if with_k else None
    x_next, x_0 = advance(student, TRAJECTORIES, x, places, PROMPTS, step_counts=k)
    torch.testing.assert_close(x_0, known(STUDENT, x, places.timestep, PROMPTS, k))
    torch.testing.assert_close(x_next, ddim(x, x_0, places.timestep, places.next_timestep), rtol=1e-4, atol=1e-5)


def test_samples_by_dpm_solver_are_diffusers() -> None:
    trajectories = trajectories_of(replace(CONFIG, solver="dpmsolver++"), COORDINATES)
    noise = normal(4, *SHAPE, seed=0)
    scheduler = DPMSolverMultistepScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="sample",
        timestep_spacing="trailing",
        lower_order_final=False,
    )
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == trajectories.ends(4)[:4]
    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(known(STUDENT, x, t.expand(4), PROMPTS, torch.full((4,), 4)), t, x).prev_sample
    torch.testing.assert_close(sample(student, trajectories, noise, 4, PROMPTS), x, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("with_k", [True, False])
@pytest.mark.parametrize("stochastic", [True, False])
def test_a_rollout_stops_before_each_samples_step(stochastic: bool, with_k: bool) -> None:
    """Samples at different K and steps, each by hand: DDIM steps, or x_0 with fresh noise after each step."""
    config = replace(CONFIG, step_condition_for="both" if with_k else "none")
    method = method_of(config)
    batch = with_renoise(batch_of(method)) if stochastic else batch_of(method)
    start = method.roll_out(batch)
    for n, (k, row) in enumerate(zip(batch.places.step_counts.tolist(), batch.places.row.tolist(), strict=True)):
        x, x_0, ends = batch.noise[n : n + 1], torch.zeros(1, *SHAPE), torch.tensor(method.trajectories.ends(k))
        for j in range(row):
            counts = torch.tensor([k]) if with_k else None
            x_0 = known(STUDENT, x, ends[j : j + 1], batch.conditioning[n : n + 1], counts)
            if batch.renoise is not None:
                alpha, sigma = levels(ends[j + 1 : j + 2])
                x = alpha * x_0 + sigma * batch.renoise[n : n + 1, j]
            else:
                x = ddim(x, x_0, ends[j : j + 1], ends[j + 1 : j + 2])
        torch.testing.assert_close(start.x[n : n + 1], x, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(start.previous[n : n + 1], x_0, rtol=1e-4, atol=1e-5)
    assert not start.x.requires_grad and not start.previous.requires_grad
    assert torch.equal(start.x[3], batch.noise[3]) and start.x is not batch.noise


@pytest.mark.parametrize("with_k", [True, False])
@pytest.mark.parametrize("stochastic", [True, False])
def test_a_sample_takes_all_steps(stochastic: bool, with_k: bool) -> None:
    noise, ends, k = normal(4, *SHAPE, seed=0), TRAJECTORIES.ends(3), torch.full((4,), 3) if with_k else None
    renoise = normal(4, 3, *SHAPE, seed=1) if stochastic else None
    x = noise
    for j in range(3):
        start, end = (torch.full((4,), t) for t in ends[j : j + 2])
        x_0 = known(STUDENT, x, start, PROMPTS, k)
        alpha, sigma = levels(end)
        x = ddim(x, x_0, start, end) if renoise is None else alpha * x_0 + sigma * renoise[:, j]
    found = sample(student, TRAJECTORIES, noise, 3, PROMPTS, with_k=with_k, renoise=renoise)
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)
    if with_k and renoise is None:
        torch.testing.assert_close(sample(student, TRAJECTORIES, noise, 3, PROMPTS), x, rtol=1e-4, atol=1e-4)


def test_a_rollout_gives_k_by_default() -> None:
    received: list[Tensor | None] = []

    def watched(x: Tensor, timesteps: Tensor, conditioning: Conditioning, k: Tensor | None) -> Tensor:
        received.append(k)
        return x

    places = Places(*(torch.tensor([value]) for value in (2, 1)), *torch.tensor([[499.0], [-1.0]]).double())
    roll_out(watched, TRAJECTORIES, torch.zeros(1, *SHAPE), places, PROMPTS[:1])
    assert [k.tolist() for k in received if k is not None] == [[2]]
    assert column(torch.ones(2)).shape == (2, 1, 1, 1)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample", "flow_prediction"])
def test_an_output_gives_its_estimate_and_an_estimate_its_output(prediction_type: PredictionType) -> None:
    schedule = FLOW.schedule if prediction_type == "flow_prediction" else COORDINATES.schedule
    coordinates, timesteps = Coordinates(schedule, prediction_type), torch.tensor([999.0, 400.0, 20.0])
    x, output = normal(3, *SHAPE, seed=1), normal(3, *SHAPE, seed=2)
    clean = coordinates.to_clean(x, output, timesteps)
    found = coordinates.to_output(x.double(), clean.double(), timesteps)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, output, rtol=1e-3, atol=1e-3)


def test_timesteps_are_even_before_the_shift_of_their_step_count() -> None:
    assert Coordinates(DiffusionSchedule(), "epsilon").even_timesteps(4) == (999, 749, 499, 249)
    few = DiffusionSchedule(num_train_timesteps=100)
    assert Coordinates(few, "epsilon").even_timesteps(4) == (99, 74, 49, 24)
    short = FlowSchedule(shift=1.0, num_train_timesteps=100)
    assert Coordinates(short, "flow_prediction").even_timesteps(4) == (100, 75, 50, 25)
    of_four = Coordinates(FlowSchedule(shift=3.0), "flow_prediction", {4: 2.0})
    assert of_four.even_timesteps(2) == pytest.approx((1000, 750))  # 3 / 2 over 1 + 2 / 2
    assert of_four.even_timesteps(4) == pytest.approx((1000, 1000 * 6 / 7, 1000 * 2 / 3, 400))
