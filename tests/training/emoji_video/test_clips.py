"""Clips show what their captions say, and the held-out ones never meet training."""

from __future__ import annotations

import random

import numpy as np
import pytest

from training.emoji.report.score import load_atlas
from training.emoji_video.clips import (
    DIRECTIONS,
    FRAMES,
    MOTIONS,
    REVERSED,
    Clip,
    ClipRenderer,
    Motion,
    caption,
    pose_at,
    sample_clip,
    video_glyphs,
)

GLYPHS = video_glyphs()
HEART = GLYPHS[0]


@pytest.fixture(scope="module")
def renderer() -> ClipRenderer:
    return ClipRenderer(load_atlas())


def ink(clip: np.ndarray) -> np.ndarray:
    """Return the centre of what differs from the background, (x, y) for each frame of [F, H, W, 3]."""
    differs = np.abs(clip.astype(float) - clip[0, 0, 0]).sum(-1) > 60
    rows, columns = np.indices(differs.shape[1:])
    return np.array([(columns[frame].mean(), rows[frame].mean()) for frame in differs])


@pytest.mark.parametrize("motion", DIRECTIONS)
def test_a_glide_crosses_the_canvas_in_its_direction_alone(motion: Motion, renderer: ClipRenderer) -> None:
    centers = ink(renderer.render(Clip(HEART, "blue", motion)))
    steps = np.diff(centers, axis=0)
    for axis, direction in enumerate(DIRECTIONS[motion]):
        if direction:
            assert (np.sign(steps[:, axis]) == direction).all()
            assert abs(centers[-1, axis] - centers[0, axis]) > 30
        else:
            assert np.abs(steps[:, axis]).max() < 1


def test_reversed_motions_are_the_others_played_backwards() -> None:
    for motion, other in zip(REVERSED, ("moving right", "moving up", "growing"), strict=True):
        for frame in range(FRAMES):
            share = frame / (FRAMES - 1)
            ours, theirs = (pose_at(m, s, (0.0, 0.0, 1.0)) for m, s in ((motion, share), (other, 1 - share)))
            assert ours.center == pytest.approx(theirs.center)
            assert ours.side == pytest.approx(theirs.side)


def test_a_spinning_clip_loops_and_a_fading_one_begins_empty(renderer: ClipRenderer) -> None:
    turns = [pose_at("spinning", n / (FRAMES - 1), (0.0, 0.0, 1.0)).angle for n in range(FRAMES)]
    assert np.diff(turns) == pytest.approx(2 * np.pi / FRAMES)
    faded = renderer.render(Clip(HEART, "green", "fading in"))
    assert (faded[0] == faded[0, 0, 0]).all()
    assert np.abs(faded[-1].astype(int) - faded[0]).max() > 100


def test_clips_are_functions_of_their_numbers_and_motions_take_turns() -> None:
    clips = [sample_clip(GLYPHS, 3, n) for n in range(27)]
    assert clips == [sample_clip(GLYPHS, 3, n) for n in range(27)]
    assert [clip.motion for clip in clips] == list(MOTIONS) * 3


def test_held_out_triples_are_about_a_tenth_and_never_in_training() -> None:
    triples = [Clip(g, background, m) for g in GLYPHS for background in ("red", "blue", "white") for m in MOTIONS]
    assert np.mean([clip.is_held_out() for clip in triples]) == pytest.approx(0.1, abs=0.03)
    assert not any(sample_clip(GLYPHS, 0, n).is_held_out() for n in range(200))
    assert all(sample_clip(GLYPHS, 0, n, held_out=True).is_held_out() for n in range(50))


def test_every_wording_names_glyph_and_motion() -> None:
    clip = Clip(HEART, "orange", "moving up")
    assert caption(clip) == "a red heart moving up on an orange background"
    for n in range(20):
        words = caption(clip, random.Random(n))
        assert "heart moving up" in words and "orange" in words
