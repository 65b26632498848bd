"""Distances between sets of pictures, as pure functions of their features.

Legend: N and M pictures with D features, float64; P prompts with S seeds.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Features = NDArray[np.float64]


def frechet_distance(first: Features, second: Features) -> float:
    """Return the squared Frechet distance of the Gaussians fitted to two sets (Heusel et al. 2017, eq. 6).

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2), which is 0 for identical sets. Small sets give too
    high numbers, so compare numbers at equal N and M only.

    Args:
        first: Features [N, D], N at least 2.
        second: Features [M, D], M at least 2.

    Raises:
        ValueError: The shapes do not fit.
    """
    _check_pair(first, second, least=2)
    # With C = R^T R, the last trace is the sum of the singular values of R1 R2^T: no root of a product of covariances,
    # which is nearly singular, and little work for few pictures.
    r1, r2 = (_covariance_factor(features) for features in (first, second))
    overlap = np.linalg.norm(r1 @ r2.T, "nuc")
    gap = first.mean(0) - second.mean(0)
    return max(0.0, float(gap @ gap + (r1**2).sum() + (r2**2).sum() - 2.0 * overlap))


def diversity(features: Features) -> float:
    """Return the mean Euclidean distance between two seeds of one prompt, averaged over the prompts.

    Args:
        features: Features [P, S, D], S at least 2.

    Raises:
        ValueError: The shape does not fit.
    """
    if features.ndim != 3 or features.shape[1] < 2:
        raise ValueError(
            f"features must be [P, S, D] with S at least 2, got {list(features.shape)}; give more seeds of each prompt"
        )
    first, second = np.triu_indices(features.shape[1], k=1)
    return float(np.linalg.norm(features[:, first] - features[:, second], axis=-1).mean())


def coverage(real: Features, generated: Features, neighbours: int = 5) -> float:
    """Return the share of real pictures with a generated one nearby, a measure of modes (Naeem et al. 2020, eq. 4).

    "Nearby" means no farther than the `neighbours`-th nearest real picture.

    Args:
        real: Features [N, D], N above `neighbours`.
        generated: Features [M, D], M at least 1.

    Returns:
        A number in 0..1. Two sets of one distribution with M = N give about 1 - 2 ** -neighbours.

    Raises:
        ValueError: The shapes do not fit.
    """
    _check_pair(real, generated, least=1)
    if not 1 <= neighbours < len(real):
        raise ValueError(
            f"neighbours is {neighbours}, and {len(real)} real pictures allow 1..{len(real) - 1}; give more pictures"
        )
    radii = np.sort(_distances(real, real), axis=1)[:, neighbours]  # column 0 is the picture itself
    return float((_distances(real, generated).min(axis=1) <= radii).mean())


def _distances(first: Features, second: Features) -> Features:
    """Return Euclidean distances, [N, M]."""
    squares = (first**2).sum(1)[:, None] + (second**2).sum(1) - 2.0 * first @ second.T
    distances: Features = np.sqrt(np.clip(squares, 0.0, None))
    return distances


def _covariance_factor(features: Features) -> Features:
    """Return R [min(N, D), D] with R^T R = the covariance."""
    centred = (features - features.mean(0)) / np.sqrt(len(features) - 1)
    return np.asarray(np.linalg.qr(centred, mode="r"), dtype=np.float64)


def _check_pair(first: Features, second: Features, least: int) -> None:
    for features in (first, second):
        if features.ndim != 2 or len(features) < least:
            raise ValueError(
                f"features must be [N, D] with N at least {least}, got {list(features.shape)}; give more pictures"
            )
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"the sets have {first.shape[1]} and {second.shape[1]} features; use one network for both")
