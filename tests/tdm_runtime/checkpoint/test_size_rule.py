"""Sizes by rule: what is allowed, and which allowed size is nearest."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdm_runtime.checkpoint.size_rule import SizeRule, parse_size_rule, rule_around
from tdm_runtime.errors import RecipeError

RULE = SizeRule(multiple=64, min_side=256, max_side=2048, max_pixels=2 * 1024 * 1024)


@pytest.mark.parametrize(
    ("size", "is_allowed"),
    [
        ((1024, 1024), True),
        ((2048, 1024), True),
        ((256, 256), True),
        ((192, 1024), False),
        ((2112, 512), False),
        ((1000, 1024), False),
        ((2048, 1088), False),
    ],
)
def test_limits_are_inclusive(size: tuple[int, int], is_allowed: bool) -> None:
    assert RULE.allows(*size) == is_allowed


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_the_nearest_size_is_allowed_and_an_allowed_size_is_its_own(width: int, height: int) -> None:
    nearest = RULE.nearest(width, height)
    assert RULE.allows(*nearest)
    assert RULE.nearest(*nearest) == nearest


@pytest.mark.parametrize(
    ("asked", "nearest"),
    [((1000, 1000), (1024, 1024)), ((1920, 1080), (1920, 1088)), ((4096, 4096), (1408, 1408)), ((64, 64), (256, 256))],
)
def test_the_nearest_size_keeps_the_shape_of_the_picture(asked: tuple[int, int], nearest: tuple[int, int]) -> None:
    assert RULE.nearest(*asked) == nearest


@pytest.mark.parametrize("native", [(64, 64), (512, 512), (1024, 576), (48, 80)])
def test_a_rule_around_a_native_size_allows_it_and_its_other_orientation(native: tuple[int, int]) -> None:
    rule = rule_around(*native, multiple=16)
    assert rule.allows(*native) and rule.allows(*reversed(native))


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (7, "size_rule is 7; it must be an object with multiple"),
        ({"multiple": 8}, "must be an object with multiple, min_side, max_side and max_pixels"),
        ({"multiple": 0, "min_side": 8, "max_side": 8, "max_pixels": 64}, "multiple of the size rule is 0"),
        ({"multiple": 8, "min_side": 12, "max_side": 64, "max_pixels": 4096}, "sides from 12 to 64"),
        ({"multiple": 8, "min_side": 64, "max_side": 32, "max_pixels": 4096}, "the smaller first"),
        ({"multiple": 8, "min_side": 64, "max_side": 64, "max_pixels": 64}, "at least min_side squared, 4096"),
        ({"multiple": 8, "min_side": 64, "max_side": 64, "max_pixels": True}, "max_pixels of the size rule is True"),
    ],
)
def test_a_rule_that_cannot_be_followed_is_refused(raw: Any, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        parse_size_rule(raw)
