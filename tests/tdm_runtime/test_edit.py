"""Edits: how many steps run, where the picture stays, and how a mask is read."""

from __future__ import annotations

import numpy as np
import pytest

from tdm_runtime.edit import Edit, GivenPicture, digest_of
from tdm_runtime.errors import InvalidRequestError

GREY = np.full((16, 24, 3), 90, np.uint8)


@pytest.mark.parametrize(
    ("steps", "strength", "run"),
    [(4, 0.25, 1), (4, 0.26, 2), (4, 0.5, 2), (4, 0.75, 3), (4, 1.0, 4), (3, 0.5, 2), (1, 0.1, 1), (3, 1 / 3, 1)],
)
def test_the_last_steps_run_as_many_as_the_strength_asks_for(steps: int, strength: float, run: int) -> None:
    assert Edit(GREY, strength).num_steps(steps) == run


@pytest.mark.parametrize("strength", [0, 0.0, -0.5, 1.01, float("nan"), "1", None])
def test_a_strength_outside_its_range_is_refused(strength: object) -> None:
    with pytest.raises(InvalidRequestError, match="strength is") as refused:
        Edit(GREY, strength)  # type: ignore[arg-type]
    assert refused.value.param == "strength"


def test_a_latent_stays_only_if_none_of_its_pixels_may_change() -> None:
    mask = np.zeros((16, 24), np.uint8)
    mask[3, 17] = 255  # one pixel, which nearest sampling would miss
    kept = Edit(GREY, 1.0, mask).kept_latents(2, 3)
    assert kept is not None and kept.tolist() == [[[1, 1, 0], [1, 1, 1]]]
    assert Edit(GREY, 1.0).kept_latents(2, 3) is None


def test_outside_the_soft_edge_the_bits_of_the_given_picture_stay() -> None:
    given = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    mask = np.zeros((128, 128), np.uint8)
    mask[40:80, 40:80] = 255
    made = 255 - given
    shown = Edit(given, 1.0, mask).blended(made)
    assert np.array_equal(shown[40:80, 40:80], made[40:80, 40:80])
    far = np.ones((128, 128), bool)
    far[35:85, 35:85] = False
    assert np.array_equal(shown[far], given[far])
    edge = shown[60, 80].astype(int)
    assert (np.minimum(given[60, 80], made[60, 80]) < edge).all() and (edge < np.maximum(given, made)[60, 80]).all()
    assert Edit(given, 1.0).blended(made) is made


def test_edits_are_equal_if_their_contents_are() -> None:
    mask = np.zeros((16, 24), np.uint8)
    same, masked, other = Edit(GREY.copy(), 0.5), Edit(GREY, 0.5, mask), Edit(GREY + np.uint8(1), 0.5)
    assert Edit(GREY, 0.5) == same and hash(Edit(GREY, 0.5)) == hash(same)
    assert len({same, masked, other, Edit(GREY, 0.6)}) == 4
    assert masked.picture_key == same.picture_key != other.picture_key
    tall = GivenPicture(np.full((24, 16, 3), 90, np.uint8))  # the same bytes
    assert GivenPicture(GREY).picture_key == same.picture_key != tall.picture_key
    assert digest_of([tall, same]) != digest_of([same, tall]) != digest_of([same])


def test_mask_and_picture_must_have_one_size() -> None:
    with pytest.raises(InvalidRequestError, match="the mask is 16x24 and the picture 24x16; send one size"):
        Edit(GREY, 0.5, np.zeros((24, 16), np.uint8))
