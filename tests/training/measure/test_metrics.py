"""Laws of the distances between sets of features."""

from __future__ import annotations

import numpy as np
import pytest

from training.measure.metrics import coverage, diversity, frechet_distance

RNG = np.random.default_rng(0)


def with_moments(mean: np.ndarray, root: np.ndarray, count: int = 400) -> np.ndarray:
    """Return a set with exactly this sample mean and this covariance, root @ root.T."""
    white = RNG.standard_normal((count, len(mean)))
    white -= white.mean(0)
    white = white @ np.linalg.inv(np.linalg.cholesky(np.cov(white, rowvar=False))).T
    return mean + white @ root.T


def test_the_frechet_distance_of_diagonal_gaussians_is_the_closed_form() -> None:
    m1, m2, s1, s2 = np.array([0.0, 1.0]), np.array([3.0, -1.0]), np.array([1.0, 2.0]), np.array([0.5, 3.0])
    first, second = with_moments(m1, np.diag(s1)), with_moments(m2, np.diag(s2))
    expected = ((m1 - m2) ** 2).sum() + ((s1 - s2) ** 2).sum()
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-9)


def test_a_rotation_of_both_gaussians_keeps_the_frechet_distance() -> None:
    turn = np.linalg.qr(RNG.standard_normal((5, 5)))[0]
    s1, s2 = np.arange(1.0, 6.0), np.arange(6.0, 1.0, -1.0)
    first, second = with_moments(np.zeros(5), turn * s1), with_moments(np.zeros(5), turn * s2)
    assert frechet_distance(first, second) == pytest.approx(((s1 - s2) ** 2).sum(), rel=1e-9)


def test_the_frechet_distance_is_zero_for_identical_sets_and_symmetric() -> None:
    first, second = RNG.standard_normal((300, 64)), 1.2 * RNG.standard_normal((200, 64)) + 0.1
    few = RNG.standard_normal((20, 64))  # singular covariance
    assert frechet_distance(first, first) == pytest.approx(0.0, abs=1e-9)
    assert frechet_distance(few, few) == pytest.approx(0.0, abs=1e-6)
    assert frechet_distance(first, second) == pytest.approx(frechet_distance(second, first), rel=1e-9)
    assert frechet_distance(first, second) > 0.5


def test_diversity_is_the_mean_distance_within_a_prompt() -> None:
    one, other = [[0.0, 0.0], [3.0, 4.0]], [[1.0, 1.0], [1.0, 2.0]]
    assert diversity(np.array([one, other])) == pytest.approx((5.0 + 1.0) / 2)
    assert diversity(np.ones((3, 4, 2))) == 0.0


def test_coverage_is_the_share_of_modes_that_are_kept() -> None:
    modes = np.repeat(np.array([[0.0], [100.0], [200.0], [300.0]]), 50, axis=0) + RNG.standard_normal((200, 1))
    assert coverage(modes, modes) == 1.0
    assert coverage(modes, modes[:50]) == pytest.approx(0.25)
    again = np.repeat(np.array([[0.0], [100.0], [200.0], [300.0]]), 50, axis=0) + RNG.standard_normal((200, 1))
    assert coverage(modes, again) > 0.85


def test_features_of_the_wrong_shape_are_rejected() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        frechet_distance(np.ones((1, 3)), np.ones((5, 3)))
    with pytest.raises(ValueError, match="3 and 4 features"):
        frechet_distance(np.ones((5, 3)), np.ones((5, 4)))
    with pytest.raises(ValueError, match="S at least 2"):
        diversity(np.ones((5, 1, 3)))
    with pytest.raises(ValueError, match=r"allow 1\.\.4"):
        coverage(np.ones((5, 3)), np.ones((5, 3)), neighbours=5)
