"""Numbers of frames: what a rule allows, the nearest allowed one, and rules that contradict themselves."""

from __future__ import annotations

import pytest

from tdm_runtime.checkpoint.frame_rule import FrameRule, parse_frame_rule
from tdm_runtime.errors import RecipeError

RULES = [FrameRule(49, 8, 97), FrameRule(81, 4, 161), FrameRule(16, 1, 32), FrameRule(1, 4, 1)]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_nearest_number_is_allowed_and_none_is_nearer(rule: FrameRule) -> None:
    allowed = [frames for frames in range(1, 300) if rule.allows(frames)]
    assert allowed == [frames for frames in range(1, rule.max_frames + 1) if (frames - 1) % rule.step == 0]
    assert rule.default in allowed
    for frames in range(-3, 300):
        nearest = rule.nearest(frames)
        assert nearest in allowed
        assert abs(nearest - frames) == min(abs(other - frames) for other in allowed)


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        ({"default": 48, "step": 8, "max_frames": 97}, "default of frames is 48; it must be one of 8 k \\+ 1 frames"),
        ({"default": 49, "step": 8, "max_frames": 33}, "default of frames is 49"),
        ({"default": 49, "step": 8, "max_frames": 96}, "max_frames of frames is 96"),
        ({"default": 49, "step": 0, "max_frames": 97}, "step of frames is 0"),
        ({"default": 49, "step": 8, "max_frames": 5000}, "max_frames of frames is 5000"),
        ({"default": True, "step": 8, "max_frames": 97}, "default of frames is True"),
        ({"default": 49, "step": 8}, "must be an object with default, step and max_frames"),
        ({"default": 49, "step": 8, "max_frames": 97, "fps": 8}, "must be an object with"),
        ([49], "must be an object with"),
    ],
)
def test_a_rule_that_cannot_be_followed_is_refused(raw: object, named: str) -> None:
    with pytest.raises(RecipeError, match=named):
        parse_frame_rule(raw)
