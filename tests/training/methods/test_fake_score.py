"""The fake score's loss equals Eq. (7), computed by hand from networks of known output."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from tests.training.methods.known import CONFIG, FAKE, SHAPE, batch_of, column, known, levels, method_of, normal
from training.methods.losses import ForwardKernel, dmd_norm, fake_score_loss, importance_weight, trajectory_score_loss
from training.methods.tdm import StudentSample

X_0, X_M = normal(4, *SHAPE, seed=5), normal(4, *SHAPE, seed=6)


def kernel_of(alpha_tau: float, sigma_tau: float, alpha_m: float, sigma_m: float) -> ForwardKernel:
    return ForwardKernel(*(torch.full((1, 1, 1, 1), level) for level in (alpha_tau, sigma_tau, alpha_m, sigma_m)))


def test_the_kernels_noise_is_what_tau_has_beyond_m() -> None:
    """beta^2 = sigma_tau^2 - (alpha_tau sigma_m / alpha_m)^2, here .8^2 - (.6 / .9 * .3)^2 = .6, and never below 0."""
    kernel = kernel_of(0.6, 0.8, 0.9, 0.3)
    assert kernel.scale.item() == pytest.approx(0.6 / 0.9)
    assert kernel.beta.item() == pytest.approx(math.sqrt(0.6))
    x, noise = normal(1, *SHAPE, seed=0), normal(1, *SHAPE, seed=1)
    torch.testing.assert_close(kernel.diffuse(x, noise), 0.6 / 0.9 * x + math.sqrt(0.6) * noise)
    torch.testing.assert_close(kernel.diffuse_clean(x, noise), 0.6 * x + 0.8 * noise)
    assert kernel_of(0.9, 0.3, 0.9, 0.3001).beta.item() == 0.0


def test_the_loss_weighs_each_sample_by_its_importance_and_by_omega() -> None:
    """Squared errors 1 and 4 at SNR 1 and 100 with weights 0.5 and 3: (0.5 * 2 * 1 + 3 * 6 * 4) / 2 = 36.5."""
    snr = torch.tensor([1.0, 100.0])
    alpha, sigma = column((snr / (1 + snr)).sqrt()), column((1 / (1 + snr)).sqrt())
    kernel, x_0 = ForwardKernel(alpha, sigma, torch.ones(2, 1, 1, 1), torch.zeros(2, 1, 1, 1)), X_0[:2]
    loss = fake_score_loss(kernel, x_0 + column(torch.tensor([1.0, 2.0])), x_0, torch.tensor([0.5, 3.0]))
    assert loss.item() == pytest.approx(36.5, rel=1e-5)


def test_an_importance_weight_is_clipped_at_20_and_at_a_twentieth() -> None:
    kernel, noise = kernel_of(0.6, 0.8, 0.9, 0.3), torch.full((1, *SHAPE), 3.0)
    x_tau = kernel.diffuse(X_M[:1], noise)
    near, far = x_tau / 0.6, x_tau / 0.6 + 30.0
    assert importance_weight(kernel, x_tau, near, noise).item() == pytest.approx(20.0)
    assert importance_weight(kernel, x_tau, far, noise).item() == pytest.approx(0.05)


@pytest.mark.parametrize("exact", [False, True])
def test_a_sample_has_the_same_weight_alone_as_in_a_batch(exact: bool) -> None:
    kernel, noise = kernel_of(0.6, 0.8, 0.9, 0.3), normal(4, *SHAPE, seed=1)
    x_tau = kernel.diffuse(X_M, noise)
    together = importance_weight(kernel, x_tau, X_0, noise, exact=exact)
    alone = [
        importance_weight(kernel, *(t[n : n + 1] for t in (x_tau, X_0, noise)), exact=exact) for n in range(len(noise))
    ]
    torch.testing.assert_close(torch.cat(alone), together)


def test_the_trajectory_scores_loss_is_the_squared_error_of_the_score_of_x_tau_given_x_m() -> None:
    """Errors of the score beside -noise / beta, as errors of x_0; beta^2 = .6, v = (.3 * .8 / .9)^2 / .6 = .1185."""
    kernel, noise = kernel_of(0.6, 0.8, 0.9, 0.3), normal(4, *SHAPE, seed=1)
    x_tau = kernel.diffuse(X_M, noise)
    score_error = noise / math.sqrt(0.6) - (x_tau - 0.6 * X_0) / 0.64
    error = 0.64 / 0.6 * score_error
    weight = (1 + (0.6 / 0.8) ** 2) / (1 + (0.3 * 0.8 / 0.9) ** 2 / 0.6)
    expected = weight * error.square().mean().item()
    assert trajectory_score_loss(kernel, X_0, X_M, noise).item() == pytest.approx(expected, rel=1e-5)


def test_the_trajectory_scores_loss_is_equation_7_at_the_last_step() -> None:
    kernel, noise = kernel_of(0.6, 0.8, 1.0, 0.0), normal(4, *SHAPE, seed=1)
    loss = trajectory_score_loss(kernel, X_M, X_0, noise)
    assert loss.item() == pytest.approx(fake_score_loss(kernel, X_M, X_0, torch.ones(4)).item())


def test_the_trajectory_scores_loss_is_finite_where_tau_meets_t_m() -> None:
    noise = normal(4, *SHAPE, seed=1)
    loss = trajectory_score_loss(kernel_of(0.9, 0.3, 0.9, 0.3001), X_0, X_M, noise)
    assert 0 < loss.item() < 100
    pure_noise = trajectory_score_loss(kernel_of(0.0, 1.0, 0.9, 0.1), X_0, X_M, noise)
    assert math.isfinite(pure_noise.item())


def test_dmds_norm_is_the_mean_gap_of_each_sample_without_gradient() -> None:
    x_0 = torch.zeros(2, *SHAPE, requires_grad=True)
    norm = dmd_norm(x_0, column(torch.tensor([-3.0, 0.0])).expand(2, *SHAPE))
    assert norm.tolist() == pytest.approx([3.0, 1e-4])
    assert not norm.requires_grad


def weights_by_hand(target: str, x_tau: Tensor, tau: Tensor, m: Tensor, noise: Tensor) -> Tensor:
    (alpha, sigma), (alpha_m, sigma_m) = levels(tau), levels(m)
    if target in ("clean", "unweighted"):
        return torch.ones(4)
    scale = alpha / alpha_m
    from_m, from_clean = (scale * X_M, (sigma**2 - (scale * sigma_m) ** 2).sqrt()), (alpha * X_0, sigma)
    log_ratio = Normal(*from_clean).log_prob(x_tau) - Normal(*from_m).log_prob(x_tau)
    if target == "importance_exact":
        return log_ratio.flatten(1).sum(1).exp()
    of_tau_alone = (from_m[1] / sigma).log()
    return (log_ratio - of_tau_alone).flatten(1).mean(1).exp().clamp(0.05, 20.0)


@pytest.mark.parametrize("condition_for", ["both", "student"])
@pytest.mark.parametrize("target", ["importance", "importance_exact", "unweighted", "clean", "trajectory_score"])
def test_the_fake_score_learns_equation_7_at_x_tau(target: str, condition_for: str) -> None:
    method = method_of(replace(CONFIG, fake_target=target, step_condition_for=condition_for))  # type: ignore[arg-type]
    batch = batch_of(method)
    forward, m = batch.fake[0], batch.places.next_timestep
    loss = method.fake_loss(batch, StudentSample(X_M.requires_grad_(), X_0.requires_grad_(), m), forward)
    (alpha, sigma), (alpha_m, sigma_m) = levels(forward.tau), levels(m)
    scale = alpha / alpha_m
    beta = (sigma**2 - (scale * sigma_m) ** 2).sqrt()
    x_tau = alpha * X_0 + sigma * forward.noise if target == "clean" else scale * X_M + beta * forward.noise
    k = batch.places.step_counts if condition_for == "both" else None
    estimate = known(FAKE, x_tau, forward.tau, batch.conditioning, k)
    omega = 1 + (alpha / sigma).square().flatten().clamp_max(5.0)
    if target == "trajectory_score":
        error = estimate - (x_tau - sigma**2 * forward.noise / beta) / alpha
        share = 1 / (1 + (sigma_m * sigma / (alpha_m * beta)).square().flatten())
        expected = (share * omega * error.square().flatten(1).mean(1)).mean()
    else:
        weight = weights_by_hand(target, x_tau, forward.tau, m, forward.noise)
        expected = (weight * omega * (estimate - X_0).square().flatten(1).mean(1)).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    loss.backward()
    assert method.roles.module("fake").gain.grad is not None  # type: ignore[union-attr]
    assert X_M.grad is None and X_0.grad is None, "the student must not learn from this loss"
