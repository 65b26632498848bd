"""The losses agree with the paper: gradients, densities and intervals, checked from first principles."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tdm_runtime.sampling.schedule import FlowSchedule
from training.config import DistillConfig
from training.emoji.stages.teacher import COORDINATES
from training.methods.batch import draw, draw_tau
from training.methods.losses import (
    ELEMENTWISE_HUBER_C,
    HUBER_C_PER_ROOT_DIM,
    ForwardKernel,
    adversarial_loss,
    consistency_scalings,
    discriminator_loss,
    dmd_norm,
    elementwise_pseudo_huber,
    fake_score_loss,
    fisher_divergence,
    importance_weight,
    normalised_l2,
    pseudo_huber,
    revised_samples,
    trajectory_score_loss,
)
from training.methods.trajectory import Coordinates, draw_places
from training.run.distill import trajectories_of

CONFIG = DistillConfig()
TRAJECTORIES = trajectories_of(CONFIG, COORDINATES)


def kernel_between(tau: int, m: int, batch: int = 1) -> ForwardKernel:
    return COORDINATES.kernel(torch.full((batch,), tau), torch.full((batch,), m), torch.zeros(batch, 1, 1, 1))


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


def test_generator_loss_is_zero_if_fake_equals_real() -> None:
    x_m, real = normal(2, 4, 4, 4), normal(2, 4, 4, 4, seed=1)
    assert pseudo_huber(x_m, revised_samples(x_m, real, real)).item() == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(("tau", "m"), [(999, 499), (499, 249), (300, 249), (249, -1), (0, -1)])
def test_diffusing_from_m_to_tau_gives_the_levels_of_tau(tau: int, m: int) -> None:
    """Variances add up: m's levels and the kernel give alpha_tau and sigma_tau."""
    kernel = kernel_between(tau, m)
    torch.testing.assert_close(kernel.scale * kernel.alpha_m, kernel.alpha_tau)
    variance = (kernel.scale * kernel.sigma_m) ** 2 + kernel.beta**2
    torch.testing.assert_close(variance, kernel.sigma_tau**2, rtol=1e-4, atol=1e-7)


def test_importance_weight_is_one_at_the_clean_end() -> None:
    """With x_m = x_0 both densities are equal."""
    kernel = kernel_between(100, -1, batch=6)
    x_0, noise = normal(6, 4, 4, 4).float(), normal(6, 4, 4, 4, seed=1).float()
    weight = importance_weight(kernel, kernel.diffuse(x_0, noise), x_0, noise)
    torch.testing.assert_close(weight, torch.ones(6), rtol=1e-4, atol=1e-4)


def test_importance_weight_is_the_density_ratio_tempered() -> None:
    """d * log(weight) is log q(x_tau | x_0) - log q(x_tau | x_m), without the factor that depends on tau alone."""
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
    """With d = 1 and no clipping, the weights turn an average over q(.|x_m) into an average over q(.|x_0)."""
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


def test_trajectory_score_loss_is_least_at_the_conditional_score() -> None:
    """The loss is 0 if the estimate implies exactly the noise from x_m to x_tau, and grows from there."""
    kernel = kernel_between(600, 499, batch=3)
    x_m, noise = normal(3, 2, 4, 4).float(), normal(3, 2, 4, 4, seed=1).float()
    x_tau = kernel.diffuse(x_m, noise)
    exact = (x_tau - kernel.sigma_tau**2 * noise / kernel.beta) / kernel.alpha_tau
    assert trajectory_score_loss(kernel, exact, x_m, noise).item() == pytest.approx(0.0, abs=1e-6)
    assert trajectory_score_loss(kernel, exact + 0.1, x_m, noise).item() > 1e-4


def test_trajectory_score_is_the_score_of_the_diffused_trajectory() -> None:
    """If x_m is Gaussian, the best linear estimate is the exact score of x_tau (Vincent 2011)."""
    count, std = 400_000, 0.7
    kernel = kernel_between(600, 499, batch=count)
    x_m, noise = std * normal(count, 1, 1, 1).float(), normal(count, 1, 1, 1, seed=1).float()
    x_tau = kernel.diffuse(x_m, noise)
    variance = (kernel.scale * std) ** 2 + kernel.beta**2
    score = -x_tau / variance

    def loss(factor: float) -> float:
        denoised = (x_tau + kernel.sigma_tau**2 * factor * score) / kernel.alpha_tau
        return trajectory_score_loss(kernel, denoised, x_m, noise).item()

    assert loss(1.0) < min(loss(0.9), loss(1.1))


def test_the_score_of_diffused_clean_samples_is_not_the_trajectorys() -> None:
    """With x_0 ~ N(0, 1) and x_m = x_0 / 2 both scores are known. This is why Eq. (7) takes samples near x_m.

    x_tau from x_0 has variance alpha^2 + sigma^2 = 1; x_tau from x_m has less. The loss on clean samples is
    least at the first score, the loss on the trajectory at the second.
    """
    count = 400_000
    kernel = kernel_between(600, 499, batch=count)
    x_0, noise = normal(count, 1, 1, 1).float(), normal(count, 1, 1, 1, seed=1).float()
    x_m = 0.5 * x_0
    from_clean, from_trajectory = kernel.diffuse_clean(x_0, noise), kernel.diffuse(x_m, noise)
    variance = from_trajectory.var().item()
    assert variance < 0.8 < from_clean.var().item()

    def denoised(x_tau: Tensor, assumed_variance: float) -> Tensor:
        """Return x_0 for the score -x / variance."""
        return (x_tau - kernel.sigma_tau**2 * x_tau / assumed_variance) / kernel.alpha_tau

    ones = torch.ones(count)
    clean = {v: fake_score_loss(kernel, denoised(from_clean, v), x_0, ones).item() for v in (1.0, variance)}
    own = {v: trajectory_score_loss(kernel, denoised(from_trajectory, v), x_m, noise).item() for v in (1.0, variance)}
    assert clean[1.0] < clean[variance]
    assert own[variance] < own[1.0]


def test_normalised_l2_has_the_gradient_of_dmd() -> None:
    """(fake - real) / mean|x_0 - real|, averaged over the elements (DMD, eq. 7 and 8)."""
    x_m, x_0, real, fake = (normal(5, 4, 8, 8, seed=seed) for seed in range(4))
    x_m.requires_grad_()
    loss = normalised_l2(x_m, revised_samples(x_m, real, fake), x_0, real)
    (gradient,) = torch.autograd.grad(loss, x_m)
    norm = dmd_norm(x_0, real).view(-1, 1, 1, 1)
    torch.testing.assert_close(gradient, (fake - real) / norm / x_m.numel())


def test_elementwise_pseudo_huber_gradient_is_bounded_by_each_element() -> None:
    """The gradient is e / sqrt(e^2 + c^2), which is the sign of the gap if the gap is far above c."""
    x_m, x_0, real, fake = (normal(3, 4, 8, 8, seed=seed) for seed in range(4))
    x_m.requires_grad_()
    loss = elementwise_pseudo_huber(x_m, revised_samples(x_m, real, fake), x_0, real)
    (gradient,) = torch.autograd.grad(loss, x_m)
    gap, norm = fake - real, dmd_norm(x_0, real).view(-1, 1, 1, 1)
    expected = gap / (gap.square() + ELEMENTWISE_HUBER_C**2).sqrt() / norm / x_m.numel()
    torch.testing.assert_close(gradient, expected)


def test_fisher_divergence_estimates_the_squared_gap_if_the_fake_score_is_exact() -> None:
    """SiD's identity: E[gap (real - x_0)] = E[gap^2] when fake = E[x_0 | x_tau]."""
    count = 100_000  # elements of one sample, so that its norm hardly depends on any of them
    kernel = kernel_between(500, -1, batch=4)
    x_0, noise = normal(4, count, 1, 1).float(), normal(4, count, 1, 1, seed=1).float()
    x_tau = kernel.diffuse(x_0, noise)
    fake = kernel.alpha_tau * x_tau  # E[x_0 | x_tau] of unit-variance data under a variance-preserving schedule
    real = fake + 0.3 * x_tau
    norm = dmd_norm(x_0, real).view(-1, 1, 1, 1)
    expected = ((real - fake).square() / norm).mean().item()
    assert fisher_divergence(real, fake, x_0, alpha=0.0).item() == pytest.approx(expected, rel=0.05)


def test_discriminator_and_student_have_opposite_losses() -> None:
    good, bad = torch.full((4, 1, 2, 2), 2.0), torch.full((4, 1, 2, 2), -2.0)
    assert discriminator_loss(good, bad).item() == 0.0
    assert discriminator_loss(bad, good).item() == 6.0
    assert adversarial_loss(good).item() < adversarial_loss(bad).item()


def test_a_consistency_function_is_the_identity_at_the_clean_end() -> None:
    c_skip, c_out = consistency_scalings(torch.tensor([0.0, 1.0, 999.0]), torch.zeros(3, 1, 1, 1))
    assert (c_skip[0].item(), c_out[0].item()) == (1.0, 0.0)
    assert c_skip[2].item() < 1e-6
    assert c_out[2].item() == pytest.approx(1.0, abs=1e-6)


def test_places_cover_every_step_of_every_count_and_nothing_else() -> None:
    places = draw_places(TRAJECTORIES, 4000, torch.Generator().manual_seed(0))
    seen = set(zip(places.step_counts.tolist(), places.row.tolist(), strict=True))
    assert seen == {(k, j) for k in TRAJECTORIES.tables for j in range(k)}


def test_intervals_start_at_t_of_i_over_k_and_end_at_the_next() -> None:
    """t_i = T i / K on the grid with the clean end at index 0. The intervals of one K cover (0, T]."""
    places = draw_places(TRAJECTORIES, 4000, torch.Generator().manual_seed(1))
    for k in TRAJECTORIES.tables:
        of_k = places.step_counts == k
        intervals = sorted(set(zip(places.next_timestep[of_k].tolist(), places.timestep[of_k].tolist(), strict=True)))
        assert [low for low, _ in intervals] == [-1, *(high for _, high in intervals[:-1])]
        assert intervals[-1][1] == 999
        assert [high + 1 for _, high in intervals] == [round(1000 * i / k) for i in range(1, k + 1)]


@pytest.mark.parametrize(("interval", "last_high"), [("disjoint", 249), ("reverse", 999), ("full", 979)])
def test_tau_stays_inside_its_interval_and_reaches_both_ends(interval: str, last_high: int) -> None:
    config = replace(CONFIG, interval=interval)  # type: ignore[arg-type]
    places = draw_places(TRAJECTORIES, 20000, torch.Generator().manual_seed(2))
    tau = draw_tau(config, COORDINATES, places, torch.Generator().manual_seed(3))
    if interval != "full":
        assert bool((tau > places.next_timestep).all())
    if interval == "disjoint":
        assert bool((tau <= places.timestep).all())
    last = (places.step_counts == 4) & (places.row == 3)
    assert tau[last].min().item() == pytest.approx(20 if interval == "full" else 0, abs=2)
    assert tau[last].max().item() == pytest.approx(last_high, abs=2)


def test_min_tau_gap_keeps_tau_above_t_m_by_the_gap() -> None:
    """The start of the step is left of an interval that is shorter than the gap."""
    places = draw_places(TRAJECTORIES, 20000, torch.Generator().manual_seed(2))
    length = places.timestep - places.next_timestep
    for gap in (40, 249, 300):
        tau = draw_tau(replace(CONFIG, min_tau_gap=gap), COORDINATES, places, torch.Generator().manual_seed(3))
        longer = length > gap
        assert bool((tau > places.next_timestep + gap)[longer].all() and (tau <= places.timestep).all())
        assert torch.equal(tau[~longer], places.timestep[~longer])
        assert tau[longer].min().item() - gap == pytest.approx(0, abs=2)


def test_flow_intervals_are_uniform_before_the_shift() -> None:
    coordinates = Coordinates(FlowSchedule(shift=3.0), "flow_prediction")
    low, high = torch.zeros(50_000, dtype=torch.float64), torch.full((50_000,), 1000.0, dtype=torch.float64)
    tau = coordinates.draw_between(low, high, torch.Generator().manual_seed(0))
    unshifted = coordinates.schedule.unshifted(tau.numpy() / 1000.0)  # type: ignore[union-attr]
    assert bool((tau > 0).all() and (tau <= 1000).all())
    assert unshifted.mean() == pytest.approx(0.5, abs=0.01)
    assert tau.mean().item() > 600, "the shift moves timesteps towards noise"


def test_an_iterations_numbers_are_a_function_of_its_generator() -> None:
    first, second = (draw(CONFIG, TRAJECTORIES, (4, 2, 2), torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first.noise, second.noise)
    assert torch.equal(first.generator.tau, second.generator.tau)
    assert not torch.equal(first.generator.noise, first.fake[0].noise)
