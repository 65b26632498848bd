"""Where each target of the fake score leaves an inner step, on Gaussian data: only one leaves it at the truth."""

from __future__ import annotations

import pytest

from training.config import FakeTarget
from training.gaussian import DIFFUSION, inner_step
from training.methods.trajectory import Coordinates
from training.mixture import FLOW


def excess(target: FakeTarget, coordinates: Coordinates = DIFFUSION, dimensions: int = 16) -> float:
    """Return how far the variance of the step at rest is above the truth, as a share of it."""
    step = inner_step(target, dimensions, 0, coordinates, elements=4000)
    return step.resting_variance() / step.true_variance - 1


@pytest.mark.parametrize("coordinates", [DIFFUSION, FLOW])
def test_the_trajectory_score_leaves_an_inner_step_at_the_truth_and_equation_7_does_not(
    coordinates: Coordinates,
) -> None:
    assert abs(excess("trajectory_score", coordinates)) < 0.02
    assert 0.03 < excess("unweighted", coordinates) < excess("clean", coordinates) - 0.1


def test_the_papers_weight_has_the_bias_of_no_importance_sampling() -> None:
    """Both minimise Eq. (7), by samples from other places; the weights' variance is infinite near t_m."""
    assert excess("importance_exact", dimensions=1) == pytest.approx(excess("clean", dimensions=1), abs=0.15)


def test_the_tempered_weight_is_weight_1_in_many_dimensions() -> None:
    tempered, weight_1 = (excess(target, dimensions=1000) for target in ("importance", "unweighted"))  # type: ignore[arg-type]
    assert tempered == pytest.approx(weight_1, abs=0.01)
    assert excess("importance", dimensions=1) > 2 * tempered
