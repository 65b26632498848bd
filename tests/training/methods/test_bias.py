"""Two claims of the paper on Gaussian data, where the best fake score is linear and can be found exactly.

The data is N(0, 1). Students are linear functions of their noise, and the fake score estimates gain_K x. Its loss is
quadratic in the gains, so two gradients give its minimum. Where real equals fake, the student is at rest.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tdm_runtime.families.conditioning import Conditioning
from tests.training.methods.known import CONFIG, COORDINATES, EMPTY, column, levels, normal
from training.config import DistillConfig
from training.methods.batch import Batch, Forward
from training.methods.roles import Guided, SeparateRoles
from training.methods.tdm import TDM, StudentSample
from training.methods.trajectory import places_at
from training.run.distill import trajectories_of

COUNT = 10_000


class Gains(nn.Module):
    """Estimate gain_K x, or gain_0 x if the network receives no K."""

    def __init__(self) -> None:
        super().__init__()
        self.gains = nn.Parameter(torch.zeros(5))

    def forward(self, x: Tensor, timesteps: Tensor, k: Tensor | None, *_: object) -> Tensor:
        return column(self.gains[torch.zeros(len(x), dtype=torch.long) if k is None else k]) * x


class Exact(Gains):
    """E[x_0 | x_t] of the data, alpha_t x under a variance-preserving schedule."""

    def forward(self, x: Tensor, timesteps: Tensor, *_: object) -> Tensor:
        return levels(timesteps)[0] * x


def method_of(**changes: str) -> TDM:
    config: DistillConfig = replace(CONFIG, guidance_scale=1.0, **changes)  # type: ignore[arg-type]
    roles = SeparateRoles(Exact(), COORDINATES, student=Gains(), precision="fp32")
    roles.fake = replace(roles.fake, denoiser=Gains())
    return TDM(roles, trajectories_of(config, COORDINATES), config, Guided(roles.teacher, EMPTY, 1.0))


def batch_of(method: TDM, k: Tensor, row: Tensor, tau: float) -> Batch:
    """Return a batch whose start and noise have unit variance and no correlation in the sample itself."""
    both, _ = torch.linalg.qr(normal(len(k), 2, seed=0))
    start, noise = (len(k) ** 0.5 * each.view(-1, 1, 1, 1) for each in both.T)
    forward = Forward(torch.full((len(k),), tau, dtype=torch.float64), noise)
    places, prompts = places_at(method.trajectories, k, row), Conditioning(torch.zeros(len(k), 1, 1))
    return Batch(places, start, (), forward, None, prompts, None)


def learn_fake_score(method: TDM, batch: Batch, sample: StudentSample) -> Tensor:
    """Give the fake score the gains of its least loss, and return them, [5]; gains that it does not use are 0."""
    gains = method.roles.fake.denoiser.gains
    assert isinstance(gains, nn.Parameter)
    gradients = []
    for value in (0.0, 1.0):
        nn.init.constant_(gains, value)
        gradients += torch.autograd.grad(method.fake_loss(batch, sample, batch.generator), gains)
    best = (gradients[0] / (gradients[0] - gradients[1])).nan_to_num()
    with torch.no_grad():
        gains.copy_(best)
    return best


def students_of_two_k(method: TDM) -> tuple[Batch, StudentSample]:
    """Return samples of variance 0.5 for K = 1 and of variance 1.5 for K = 2, so 1 on average, at the clean end."""
    k = torch.tensor([1, 2]).repeat(COUNT)
    batch = batch_of(method, k, k - 1, tau=300.0)
    x = batch.noise * column(torch.where(k == 1, 0.5**0.5, 1.5**0.5))
    return batch, StudentSample(x, x, batch.places.next_timestep)


def test_one_fake_score_for_every_k_leaves_students_that_are_right_on_average() -> None:
    """Eq. (9): the mixture of both students has the data's score, so the shared fake score moves neither."""
    method = method_of(step_condition_for="student")
    batch, sample = students_of_two_k(method)
    learn_fake_score(method, batch, sample)
    _, gap = method.generator_loss(batch, sample, batch.generator)
    assert gap.item() < 0.02


def test_a_fake_score_that_receives_k_moves_each_student_to_the_data() -> None:
    """Eq. (8): the student of K = 1 grows and that of K = 2 shrinks."""
    method = method_of(step_condition_for="both")
    batch, sample = students_of_two_k(method)
    learn_fake_score(method, batch, sample)
    x_m = sample.x_m.clone().requires_grad_()
    loss, gap = method.generator_loss(batch, StudentSample(x_m, sample.x_0, sample.timestep), batch.generator)
    (gradient,) = torch.autograd.grad(loss, x_m)
    outward = -(gradient * sample.x_m).flatten()
    k = batch.places.step_counts
    assert gap.item() > 0.1
    assert outward[k == 1].sum().item() > 0 > outward[k == 2].sum().item()


def bias_at_the_true_trajectory(target: str, tau: float) -> tuple[float, float]:
    """Return |fake - real| / |real| at tau for a student whose first of two steps ends at the right variance.

    The second number is that of the exact score of the student's diffused x_0, which is gain * noise.
    """
    method = method_of(fake_target=target)
    k = torch.full((COUNT,), 2)
    batch = batch_of(method, k, torch.zeros_like(k), tau)
    (alpha, sigma), (alpha_m, sigma_m) = levels(batch.places.timestep), levels(batch.places.next_timestep)
    # x_m = alpha_m x_0 + sigma_m (noise - alpha x_0) / sigma equals the noise, whose variance is the data's at t_m.
    gain = (1 - sigma_m / sigma) / (alpha_m - sigma_m * alpha / sigma)
    sample = StudentSample(batch.noise, gain * batch.noise, batch.places.next_timestep)
    found = float(learn_fake_score(method, batch, sample)[2])
    real, sigma_tau = (float(level[0]) for level in levels(batch.generator.tau))
    clean = real * float(gain[0]) ** 2 / ((real * float(gain[0])) ** 2 + sigma_tau**2)
    return abs(found - real) / real, abs(clean - real) / real


@pytest.mark.parametrize(("tau", "expected"), [(520.0, 0.501), (550.0, 0.617)])
def test_importance_sampling_makes_the_bias_of_inner_steps_smaller(tau: float, expected: float) -> None:
    """Without it the fake score is that of diffused clean samples, which is off by 0.87 and 0.88.

    With it a part of this stays; the expected values are integrals of Eq. (7) over a grid. Only the trajectory score,
    which is not in the paper, has none.
    """
    unweighted, of_clean_samples = bias_at_the_true_trajectory("clean", tau)
    assert unweighted == pytest.approx(of_clean_samples, rel=1e-3)
    assert unweighted == pytest.approx(0.874, abs=0.003)
    assert bias_at_the_true_trajectory("importance", tau)[0] == pytest.approx(expected, abs=0.01)
    assert bias_at_the_true_trajectory("trajectory_score", tau)[0] < 1e-3
