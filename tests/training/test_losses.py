"""The losses are the paper's: gradients, densities and intervals, checked against first principles."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from training.losses import (
    HUBER_C_PER_ROOT_DIM,
    ForwardKernel,
    fake_score_loss,
    importance_weight,
    pseudo_huber,
    revised_samples,
)
from training.tdm import build_recipe, draw_places
from training.teacher import levels_at

TABLES = build_recipe((1, 2, 3, 4)).step_tables


def kernel_between(tau: int, m: int, batch: int = 1) -> ForwardKernel:
    return ForwardKernel(*levels_at(torch.full((batch,), tau)), *levels_at(torch.full((batch,), m)))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_pseudo_huber_gradient_is_equation_12() -> None:
    """d/dx_m = (fake - real) / sqrt(||real - fake||^2 + c^2), averaged over the batch."""
    x_m, real, fake = (normal(5, 4, 8, 8, seed=seed) for seed in range(3))
    x_m.requires_grad_()
    loss = pseudo_huber(x_m, revised_samples(x_m, real, fake))
    (gradient,) = torch.autograd.grad(loss, x_m)
    c = HUBER_C_PER_ROOT_DIM * math.sqrt(4 * 8 * 8)
    norm = ((real - fake).square().flatten(1).sum(1) + c * c).sqrt().view(-1, 1, 1, 1)
    torch.testing.assert_close(gradient, (fake - real) / norm / 5)


def test_generator_loss_vanishes_where_fake_equals_real() -> None:
    x_m, real = normal(2, 4, 4, 4), normal(2, 4, 4, 4, seed=1)
    assert pseudo_huber(x_m, revised_samples(x_m, real, real)).item() == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(("tau", "m"), [(999, 499), (499, 249), (300, 249), (249, -1), (0, -1)])
def test_diffusing_on_from_the_trajectory_gives_the_marginal_of_tau(tau: int, m: int) -> None:
    """alpha_tau and sigma_tau are recovered from m's levels and the kernel: variances add up."""
    kernel = kernel_between(tau, m)
    torch.testing.assert_close(kernel.scale * kernel.alpha_m, kernel.alpha_tau)
    variance = (kernel.scale * kernel.sigma_m) ** 2 + kernel.beta**2
    torch.testing.assert_close(variance, kernel.sigma_tau**2, rtol=1e-4, atol=1e-7)


def test_importance_weight_is_one_from_the_clean_end() -> None:
    """With x_m = x_0 both densities are one."""
    kernel = kernel_between(100, -1, batch=6)
    x_0, noise = normal(6, 4, 4, 4).float(), normal(6, 4, 4, 4, seed=1).float()
    weight = importance_weight(kernel, kernel.diffuse(x_0, noise), x_0, noise)
    torch.testing.assert_close(weight, torch.ones(6), rtol=1e-4, atol=1e-4)


def test_importance_weight_is_the_density_ratio_tempered() -> None:
    """Its logarithm times d is log q(x_tau | x_0) - log q(x_tau | x_m) without the factor of tau alone."""
    kernel = kernel_between(600, 499, batch=3)
    x_m, x_0, noise = (normal(3, 2, 2, 2, seed=seed).float() for seed in range(3))
    x_0 = 0.1 * x_0 + x_m
    x_tau = kernel.diffuse(x_m, noise)

    def log_density(x: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
        return torch.distributions.Normal(mean, scale).log_prob(x).flatten(1).sum(1)

    d = x_m[0].numel()
    ratio = log_density(x_tau, kernel.alpha_tau * x_0, kernel.sigma_tau) - log_density(
        x_tau, kernel.scale * x_m, kernel.beta
    )
    of_tau_alone = d * (kernel.beta / kernel.sigma_tau).log().flatten()
    weight = importance_weight(kernel, x_tau, x_0, noise)
    torch.testing.assert_close(d * weight.log(), ratio - of_tau_alone, rtol=1e-3, atol=1e-3)


def test_importance_sampling_is_unbiased_in_one_dimension() -> None:
    """Untempered (d = 1) and unclipped weights turn an average over q(.|x_m) into one over q(.|x_0)."""
    count = 400_000
    kernel = kernel_between(700, 499)
    x_0 = torch.zeros(count, 1, 1, 1)
    x_m = torch.full((count, 1, 1, 1), 0.2)
    noise = normal(count, 1, 1, 1).float()
    x_tau = kernel.diffuse(x_m, noise)
    weight = importance_weight(kernel, x_tau, x_0, noise) * (kernel.beta / kernel.sigma_tau).flatten()
    estimate = (weight * x_tau.flatten().square()).mean()
    assert weight.mean().item() == pytest.approx(1.0, abs=0.02)
    assert estimate.item() == pytest.approx(kernel.sigma_tau.square().item(), rel=0.03)


def test_fake_score_loss_is_least_at_the_students_clean_estimate() -> None:
    kernel = kernel_between(400, 249, batch=4)
    x_0, weight = normal(4, 4, 4, 4).float(), torch.ones(4)
    assert fake_score_loss(kernel, x_0, x_0, weight).item() == 0.0
    assert fake_score_loss(kernel, x_0 + 0.1, x_0, weight).item() > 0.0


def test_places_cover_every_step_of_every_count_and_nothing_else() -> None:
    places = draw_places(TABLES, 4000, torch.Generator().manual_seed(0))
    seen = set(zip(places.step_counts.tolist(), places.row.tolist(), strict=True))
    assert seen == {(k, j) for k in TABLES for j in range(k)}


def test_intervals_start_at_t_of_i_over_k_and_end_at_the_next() -> None:
    """t_i = T i / K on the grid whose index 0 is the clean end; one K's intervals tile (0, T]."""
    places = draw_places(TABLES, 4000, torch.Generator().manual_seed(1))
    for k in TABLES:
        of_k = places.step_counts == k
        intervals = sorted(set(zip(places.next_timestep[of_k].tolist(), places.timestep[of_k].tolist(), strict=True)))
        assert [low for low, _ in intervals] == [-1, *(high for _, high in intervals[:-1])]
        assert intervals[-1][1] == 999
        assert [high + 1 for _, high in intervals] == [round(1000 * i / k) for i in range(1, k + 1)]


def test_tau_stays_inside_its_interval_and_reaches_both_ends() -> None:
    places = draw_places(TABLES, 20000, torch.Generator().manual_seed(2))
    tau = places.draw_tau(torch.Generator().manual_seed(3))
    assert bool((tau > places.next_timestep).all() and (tau <= places.timestep).all())
    last = (places.step_counts == 4) & (places.row == 3)
    assert tau[last].min().item() == 0
    assert tau[last].max().item() == 249
