"""Consistency distillation (LCM, TCD): the teacher's step and the losses, against cases with known answers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tests.training.methods.known import (
    CONFIG,
    COORDINATES,
    EMPTY,
    SHAPE,
    KnownDenoiser,
    batch_of,
    column,
    known,
    levels,
    method_of,
    normal,
)
from training.methods.batch import Batch, Forward
from training.methods.lcm import LCM, TCD, ConsistencyFunction, averaged, ddim_step, teacher_step
from training.methods.losses import consistency_loss, consistency_scalings
from training.methods.roles import CleanEstimator, Guided


class OnePoint(nn.Module):
    """Denoiser of data that is one point."""

    def __init__(self, point: Tensor) -> None:
        super().__init__()
        self.point = point

    def forward(self, x: Tensor, *_: object) -> Tensor:
        return self.point.expand_as(x)


def estimator(denoiser: nn.Module) -> CleanEstimator:
    return CleanEstimator(denoiser, COORDINATES, "fp32")


def lcm_of(teacher: nn.Module, guidance_scale: float = 2.5) -> LCM:
    student = ConsistencyFunction(estimator(KnownDenoiser(0.5)))
    target = ConsistencyFunction(estimator(KnownDenoiser(0.7)))
    return LCM(Guided(estimator(teacher), EMPTY, guidance_scale), student, target, COORDINATES)


def batch_at(tau: list[float]) -> Batch:
    """Return a batch whose tau are given."""
    batch = batch_of(method_of(CONFIG))
    return replace(batch, generator=Forward(torch.tensor(tau, dtype=torch.float64), batch.generator.noise))


def scalings(timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """Return LCM's c_skip and c_out at ten times the timestep after this one, with the data's spread of 0.5."""
    scaled = column(10 * (timesteps.float() + 1))
    return 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25).sqrt()


def test_the_scalings_between_the_ends() -> None:
    """A tenth of the data's spread of 0.5 is where both parts weigh the same."""
    c_skip, c_out = consistency_scalings(torch.tensor([0.05]), torch.zeros(1, 1, 1, 1))
    assert (c_skip.item(), c_out.item()) == (pytest.approx(0.5), pytest.approx(math.sqrt(0.5)))


def test_a_consistency_function_mixes_sample_and_estimate() -> None:
    x, timesteps, prompts = normal(2, *SHAPE, seed=0), torch.tensor([0.0, 500.0]), batch_at([9.0] * 4).conditioning[:2]
    k = torch.tensor([2, 3])
    found = ConsistencyFunction(estimator(KnownDenoiser(0.5)))(x, timesteps, prompts, k)
    c_skip, c_out = scalings(timesteps)
    torch.testing.assert_close(found, c_skip * x + c_out * known(0.5, x, timesteps, prompts, k))


def test_the_teachers_step_moves_a_sample_along_its_own_noise() -> None:
    """With data of one point, x = alpha point + sigma noise at every timestep of the teacher's path."""
    point, noise = normal(1, *SHAPE, seed=0), normal(4, *SHAPE, seed=1)
    high, low = torch.tensor([999, 519, 39, 19]), torch.tensor([979, 499, 19, -1])
    (alpha_high, sigma_high), (alpha_low, sigma_low) = levels(high), levels(low)
    given = replace(batch_at([999.0, 519.0, 39.0, 19.0]), latents=point.expand(4, *SHAPE))
    given = replace(given, generator=Forward(given.generator.tau, noise))
    step = teacher_step(Guided(estimator(OnePoint(point)), EMPTY, 2.5), COORDINATES, given)
    assert (step.high.tolist(), step.low.tolist()) == (high.tolist(), low.tolist())
    torch.testing.assert_close(step.x_high, alpha_high * point + sigma_high * noise, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(step.x_low, alpha_low * point + sigma_low * noise, rtol=1e-4, atol=1e-4)


def test_the_loss_is_equation_10_between_the_ends_of_a_guided_step() -> None:
    """Tau is rounded up to the teacher's grid 19, 39, ..., 999. The last step ends at the clean end."""
    batch = batch_at([1.0, 20.0, 499.0, 999.0])
    high, low = torch.tensor([19, 39, 499, 999]), torch.tensor([-1, 19, 479, 979])
    lcm, prompts = lcm_of(KnownDenoiser(0.9)), batch.conditioning
    (alpha_high, sigma_high), (alpha_low, sigma_low) = levels(high), levels(low)
    assert batch.latents is not None
    x_high = alpha_high * batch.latents + sigma_high * batch.generator.noise
    conditional, empty = (known(0.9, x_high, high, p) for p in (prompts, EMPTY))
    x_0 = empty + 2.5 * (conditional - empty)
    x_low = alpha_low * x_0 + sigma_low * (x_high - alpha_high * x_0) / sigma_high

    def function(gain: float, x: Tensor, timesteps: Tensor) -> Tensor:
        c_skip, c_out = scalings(timesteps)
        return c_skip * x + c_out * known(gain, x, timesteps, prompts)

    squared = (function(0.5, x_high, high) - function(0.7, x_low, low)).square().flatten(1).sum(1)
    c = 0.00054 * math.sqrt(math.prod(SHAPE))
    loss = lcm.loss(batch)
    torch.testing.assert_close(loss, ((squared + c**2).sqrt() - c).mean(), rtol=1e-4, atol=1e-5)
    loss.backward()  # type: ignore[no-untyped-call]
    student, target = lcm.student.estimate.denoiser, lcm.target.estimate.denoiser
    assert student.gain.grad is not None and target.gain.grad is None


def test_a_ddim_step_by_hand() -> None:
    """To the clean end it is x_0, of no length it is x, and between it keeps x_0 and scales the noise down."""
    x, x_0 = torch.full((3, 1, 1, 1), 2.0), torch.full((3, 1, 1, 1), 0.5)
    start, end = torch.tensor([600, 600, 600]), torch.tensor([-1, 600, 200])
    (alpha, sigma), (alpha_end, sigma_end) = levels(start), levels(end)
    found = ddim_step(COORDINATES, x, x_0, start, end).flatten()
    noise = (2.0 - alpha[2] * 0.5) / sigma[2]
    assert found[:2].tolist() == [0.5, 2.0]
    torch.testing.assert_close(found[2], (alpha_end[2] * 0.5 + sigma_end[2] * noise).squeeze())
    clean = torch.tensor([-1, -1, -1])
    assert torch.equal(ddim_step(COORDINATES, x, x_0, clean, clean), x)


def tcd_of(teacher: nn.Module, student: nn.Module, target: nn.Module) -> TCD:
    return TCD(Guided(estimator(teacher), EMPTY, 2.5), estimator(student), estimator(target), COORDINATES)


def test_the_loss_of_tcd_is_between_steps_to_a_common_end() -> None:
    """The end lies a share of the way from the clean end to the lower end of the teacher's step."""
    batch = batch_at([1.0, 20.0, 499.0, 999.0])
    batch = replace(batch, fake=(Forward(torch.tensor([999.0, 0.0, 333.0, 666.0]), batch.noise),))
    high, low, end = (
        torch.tensor([19, 39, 499, 999]),
        torch.tensor([-1, 19, 479, 979]),
        torch.tensor([-1, -1, 159, 652]),
    )
    tcd, prompts = tcd_of(KnownDenoiser(0.9), KnownDenoiser(0.5), KnownDenoiser(0.7)), batch.conditioning
    step = teacher_step(tcd.teacher, COORDINATES, batch)
    (alpha_high, sigma_high), (alpha_low, sigma_low), (alpha_end, sigma_end) = (levels(t) for t in (high, low, end))
    ours = known(0.5, step.x_high, high, prompts)
    ours = alpha_end * ours + sigma_end * (step.x_high - alpha_high * ours) / sigma_high
    theirs = known(0.7, step.x_low, low, prompts)
    theirs = alpha_end * theirs + sigma_end * (step.x_low - alpha_low * theirs) / sigma_low
    theirs[0] = step.x_low[0]  # the teacher's step ends at the clean end
    squared = (ours - theirs).square().flatten(1).sum(1)
    c = 0.00054 * math.sqrt(math.prod(SHAPE))
    loss = tcd.loss(batch)
    torch.testing.assert_close(loss, ((squared + c**2).sqrt() - c).mean(), rtol=1e-4, atol=1e-5)
    loss.backward()  # type: ignore[no-untyped-call]
    assert tcd.student.denoiser.gain.grad is not None and tcd.target.denoiser.gain.grad is None


def test_a_student_that_knows_the_data_has_no_loss_of_tcd_and_one_that_errs_has() -> None:
    """With data of one point every step of the teacher's path is right, whatever its end."""
    point = normal(1, *SHAPE, seed=0)
    batch = replace(batch_at([60.0, 300.0, 700.0, 999.0]), latents=point.expand(4, *SHAPE))
    right, wrong = OnePoint(point), OnePoint(point + 1.0)
    assert tcd_of(right, right, right).loss(batch) < 1e-3
    assert tcd_of(right, wrong, right).loss(batch) > 0.1


def test_the_target_of_the_loss_has_no_gradient() -> None:
    estimate, target = (normal(2, *SHAPE, seed=seed).requires_grad_() for seed in (0, 1))
    consistency_loss(estimate, target).backward()  # type: ignore[no-untyped-call]
    assert estimate.grad is not None and target.grad is None


def test_the_averaged_student_has_other_weights_and_the_students_settings() -> None:
    student, average = estimator(KnownDenoiser(0.5)), KnownDenoiser(0.7)
    assert averaged(student, average) == replace(student, denoiser=average)
    assert averaged(student, average).precision == "fp32"
