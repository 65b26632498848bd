"""The scorer of clips accepts drawn clips, and rejects wrong motions, glyphs and backgrounds."""

from __future__ import annotations

import random

import numpy as np
import pytest

from training.emoji_video.clips import MOTIONS, Clip, sample_clip, video_glyphs
from training.emoji_video.score import ClipScorer, contact_sheet

COUNT = 27


@pytest.fixture(scope="module")
def scorer() -> ClipScorer:
    return ClipScorer()


@pytest.fixture(scope="module")
def jittered() -> list[Clip]:
    """Clips with the jitter of training, all on one background, because drawings are made for each."""
    clips = (sample_clip(video_glyphs(), 7, n) for n in range(COUNT))
    return [Clip(clip.glyph, "purple", clip.motion, clip.jitter) for clip in clips]


def test_drawn_clips_score_full_marks_and_shuffled_captions_score_chance(
    scorer: ClipScorer, jittered: list[Clip]
) -> None:
    drawn, asked = [scorer.renderer.render(clip) for clip in jittered], [plain(clip) for clip in jittered]
    right = scorer.score(drawn, asked)
    assert (right.motion, right.glyph, right.background) == (1.0, 1.0, 1.0)
    assert right.unevenness == pytest.approx(1.0, abs=0.1)
    assert set(right.by_motion.values()) == {1.0} and set(right.by_motion) == set(MOTIONS)
    random.Random(0).shuffle(asked)
    wrong = scorer.score(drawn, asked)
    assert wrong.motion < 0.35 and wrong.glyph < 0.2


def test_a_clip_played_backwards_has_the_wrong_motion(scorer: ClipScorer) -> None:
    clip = Clip(video_glyphs()[3], "purple", "moving right")
    assert scorer.judge(scorer.renderer.render(clip)[::-1], clip).motion == "moving left"


def test_a_wrong_background_and_flicker_show_and_grain_that_stays_does_not_count_as_flicker(scorer: ClipScorer) -> None:
    clip = Clip(video_glyphs()[1], "purple", "still")
    other = scorer.renderer.render(Clip(clip.glyph, "green", "still"))
    assert scorer.judge(other, clip).background == "green"
    moving = Clip(clip.glyph, "purple", "moving up")
    drawn = scorer.renderer.render(moving)
    noise = np.random.default_rng(0).normal(0, 20, drawn.shape)
    flickering, grainy = ((drawn + n).clip(0, 255).astype(np.uint8) for n in (noise, noise[:1]))
    assert scorer.score([flickering], [moving]).unevenness > 1.2
    assert scorer.score([grainy], [moving]).unevenness == pytest.approx(1.0, abs=0.1)


def test_a_contact_sheet_has_clips_down_and_frames_across(scorer: ClipScorer) -> None:
    clips = [scorer.renderer.render(Clip(glyph, "red", "growing")) for glyph in video_glyphs()[:2]]
    assert np.array_equal(np.asarray(contact_sheet(clips))[64:, 64:128], clips[1][1])


def plain(clip: Clip) -> Clip:
    return Clip(clip.glyph, clip.background, clip.motion)
