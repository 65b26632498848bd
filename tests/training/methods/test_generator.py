"""The student's loss has the gradient of the paper, computed by hand from networks of known output."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.training.methods.known import (
    CONFIG,
    EMPTY,
    FAKE,
    SHAPE,
    STUDENT,
    TEACHER,
    batch_of,
    column,
    known,
    levels,
    method_of,
    normal,
)
from training.methods.losses import elementwise_pseudo_huber, fisher_divergence, normalised_l2, pseudo_huber
from training.methods.tdm import StudentSample
from training.methods.trajectory import places_at

X_0, X_M = normal(4, *SHAPE, seed=5), normal(4, *SHAPE, seed=6)
DIMS = math.prod(SHAPE)


def test_the_values_of_the_surrogate_losses() -> None:
    """A gap of 3 in each of 12 elements, with a mean |x_0 - real| of 2."""
    x, gap, x_0, real = torch.zeros(1, *SHAPE), torch.full((1, *SHAPE), 3.0), torch.zeros(1, *SHAPE), -2.0
    target = torch.full((1, *SHAPE), real)
    c = 0.00054 * math.sqrt(DIMS)
    assert pseudo_huber(x, gap).item() == pytest.approx(math.sqrt(9 * DIMS + c**2) - c)
    assert elementwise_pseudo_huber(x, gap, x_0, target).item() == pytest.approx((math.sqrt(9 + 1e-6) - 1e-3) / 2)
    assert normalised_l2(x, gap, x_0, target).item() == pytest.approx(0.5 * 9 / 2)


def test_fisher_divergence_is_sids_loss() -> None:
    """SiD, eq. 23: gap (real - x_0) - alpha gap^2, over |x_0 - real|; here 2 * 5 - 1.2 * 4, by default 2 * 5 - 4."""
    real, fake, x_0 = (torch.full((1, *SHAPE), value) for value in (6.0, 4.0, 1.0))
    assert fisher_divergence(real, fake, x_0, alpha=1.2).item() == pytest.approx((10 - 1.2 * 4) / 5)
    assert fisher_divergence(real, fake, x_0).item() == pytest.approx((10 - 4) / 5)


@pytest.mark.parametrize("spread", [0.5, 2.0])
def test_fisher_divergence_moves_the_spread_of_a_gaussian_student_to_the_datas(spread: float) -> None:
    """Data N(0, 1), a student with samples spread * z, and the exact score of each, as linear estimates of x_0."""
    alpha, sigma, count = 0.8, 0.6, 50_000
    z, noise = normal(1, count, 1, 1, seed=0), normal(1, count, 1, 1, seed=1)
    student = torch.tensor(spread, requires_grad=True)
    x_0 = student * z
    x_tau = alpha * x_0 + sigma * noise
    real, fake = alpha * x_tau, alpha * spread**2 / (alpha**2 * spread**2 + sigma**2) * x_tau
    (gradient,) = torch.autograd.grad(fisher_divergence(real, fake, x_0), student)
    assert (gradient.item() < 0) == (spread < 1.0)


def scores_by_hand(x_tau: Tensor, method_batch: tuple, guidance_scale: float) -> tuple[Tensor, Tensor]:  # type: ignore[type-arg]
    batch, k = method_batch
    tau, prompts = batch.generator.tau, batch.conditioning
    conditional, empty = known(TEACHER, x_tau, tau, prompts), known(TEACHER, x_tau, tau, EMPTY)
    return empty + guidance_scale * (conditional - empty), known(FAKE, x_tau, tau, prompts, k)


@pytest.mark.parametrize("condition_for", ["both", "none"])
@pytest.mark.parametrize("choice", ["pseudo_huber", "elementwise_pseudo_huber", "normalised_l2", "fisher"])
def test_the_student_follows_fake_minus_real(choice: str, condition_for: str) -> None:
    """Eq. (12) for the default; DMD's gradient for plain L2; SiD's for Fisher."""
    method = method_of(replace(CONFIG, generator_loss=choice, step_condition_for=condition_for))  # type: ignore[arg-type]
    batch = batch_of(method)
    forward, m = batch.generator, batch.places.next_timestep
    k = batch.places.step_counts if condition_for == "both" else None
    x_m, x_0 = X_M.clone().requires_grad_(), X_0.clone().requires_grad_()
    loss, gap = method.generator_loss(batch, StudentSample(x_m, x_0, m), forward)
    found = torch.autograd.grad(loss, (x_m, x_0), allow_unused=True, materialize_grads=True)

    (alpha, sigma), (alpha_m, sigma_m) = levels(forward.tau), levels(m)
    scale = alpha / alpha_m
    x_tau = scale * x_m + (sigma**2 - (scale * sigma_m) ** 2).sqrt() * forward.noise
    real, fake = scores_by_hand(x_tau, (batch, k), 2.5)
    difference, norm = (fake - real).detach(), column((x_0 - real).detach().abs().flatten(1).mean(1))
    length = column(difference.square().flatten(1).sum(1) + (0.00054 * math.sqrt(DIMS)) ** 2).sqrt()
    of_x_m = {
        "pseudo_huber": difference / length / 4,
        "elementwise_pseudo_huber": difference / (difference.square() + 1e-6).sqrt() / norm / (4 * DIMS),
        "normalised_l2": difference / norm / (4 * DIMS),
    }
    if choice == "fisher":
        by_hand = ((real - fake) * (fake - x_0) / norm).mean()
        expected = torch.autograd.grad(by_hand, (x_m, x_0))
    else:
        expected = (of_x_m[choice], torch.zeros_like(x_0))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert gap.item() == pytest.approx(difference.square().mean().sqrt().item(), rel=1e-5)
    assert not gap.requires_grad


@pytest.mark.parametrize("condition_for", ["student", "none"])
@pytest.mark.parametrize("matching", ["noisy", "clean"])
def test_the_students_step_is_ddims(matching: str, condition_for: str) -> None:
    """x_m = alpha_m x_0 + sigma_m (x - alpha x_0) / sigma, and at the clean end x_0."""
    method = method_of(replace(CONFIG, matching=matching, step_condition_for=condition_for))  # type: ignore[arg-type]
    batch = batch_of(method)
    start = method.roll_out(batch)
    sample = method.student_step(batch, start)
    k = batch.places.step_counts if condition_for == "student" else None
    x_0 = known(STUDENT, start.x, batch.places.timestep, batch.conditioning, k)
    (alpha, sigma), (alpha_m, sigma_m) = levels(batch.places.timestep), levels(batch.places.next_timestep)
    x_m = alpha_m * x_0 + sigma_m * (start.x - alpha * x_0) / sigma
    torch.testing.assert_close(sample.x_0, x_0)
    torch.testing.assert_close(sample.x_m, x_m if matching == "noisy" else x_0, rtol=1e-4, atol=1e-5)
    expected = batch.places.next_timestep if matching == "noisy" else torch.full((4,), -1.0, dtype=torch.float64)
    assert torch.equal(sample.timestep, expected)
    assert sample.x_m.requires_grad and not sample.detach().x_m.requires_grad and not sample.detach().x_0.requires_grad
    torch.testing.assert_close(sample.detach().x_0, x_0)


@pytest.mark.parametrize("solver", ["ddim", "dpmsolver++"])
def test_the_students_step_continues_its_rollout(solver: str) -> None:
    """x_m is where a rollout of one step more ends. A solver of second order reads x_0 of the step before."""
    method = method_of(replace(CONFIG, solver=solver))  # type: ignore[arg-type]
    k, row = torch.tensor([4, 4, 4, 3]), torch.tensor([0, 1, 2, 1])
    here, further = (
        replace(batch_of(method), places=places_at(method.trajectories, k, row + steps)) for steps in (0, 1)
    )
    sample = method.student_step(here, method.roll_out(here))
    end = method.roll_out(further)
    torch.testing.assert_close(sample.x_m, end.x)
    torch.testing.assert_close(sample.x_0, end.previous)
