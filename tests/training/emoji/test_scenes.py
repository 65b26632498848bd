"""Scenes are pure functions of their number, and captions describe them."""

from __future__ import annotations

import random

import numpy as np
import pytest

from training.emoji.data.glyphs import load_glyphs
from training.emoji.data.scenes import BACKGROUNDS, Scene, caption, sample_scene
from training.emoji.report.score import Scorer, nearest_background, scoring_scenes

GLYPHS = load_glyphs()
GLYPH_BY_NAME = {name: glyph for glyph in GLYPHS for name in glyph.names}
SCENES = [sample_scene(GLYPHS, 0, index) for index in range(300)]


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return Scorer()


def test_glyph_names_are_unique() -> None:
    names = [name for glyph in GLYPHS for name in glyph.names]
    assert len(names) == len(set(names))
    assert len({glyph.character for glyph in GLYPHS}) == len(GLYPHS)


def test_a_scene_is_a_function_of_seed_and_index() -> None:
    assert sample_scene(GLYPHS, 3, 7) == sample_scene(GLYPHS, 3, 7)
    assert sample_scene(GLYPHS, 3, 7) != sample_scene(GLYPHS, 4, 7)


def test_training_never_sees_a_held_out_combination() -> None:
    assert not any(scene.is_held_out() for scene in SCENES)
    assert all(scene.is_held_out() for scene in scoring_scenes(50, held_out=True))


def test_the_order_of_a_pair_does_not_decide_whether_it_is_held_out() -> None:
    for scene in SCENES:
        if len(scene.glyphs) == 2:
            assert Scene(scene.glyphs[::-1], scene.background).is_held_out() == scene.is_held_out()


def test_plain_captions_name_glyph_place_and_background() -> None:
    heart, butterfly = GLYPH_BY_NAME["red heart"], GLYPH_BY_NAME["butterfly"]
    assert caption(Scene((heart, butterfly), "blue")) == "a red heart left of a butterfly on a blue background"
    assert caption(Scene((heart,), size="small", place="top")) == "a small red heart at the top"
    assert caption(Scene((GLYPH_BY_NAME["apple"],), "orange")) == "a red apple on an orange background"


def test_every_wording_names_every_glyph_and_any_coloured_background() -> None:
    rng = random.Random(0)
    for scene in SCENES:
        words = caption(scene, rng)
        assert all(any(name in words for name in glyph.names) for glyph in scene.glyphs)
        assert scene.background == "white" or scene.background in words


@pytest.mark.parametrize("background", sorted(BACKGROUNDS))
def test_a_drawn_background_is_recognised(background: str, scorer: Scorer) -> None:
    assert nearest_background(scorer.draw(Scene((GLYPH_BY_NAME["cat"],), background))) == background


def test_drawn_scenes_have_full_adherence_and_shuffled_ones_almost_none(scorer: Scorer) -> None:
    scenes = scoring_scenes(24)
    pictures = [scorer.draw(scene) for scene in scenes]
    assert scorer.score(pictures, scenes).adherence == 1.0
    assert scorer.score(pictures[1:] + pictures[:1], scenes).adherence <= 0.05


def test_a_blank_picture_shows_no_glyph(scorer: Scorer) -> None:
    scenes = scoring_scenes(24)
    blank = [np.full((64, 64, 3), BACKGROUNDS[scene.background], dtype=np.uint8) for scene in scenes]
    score = scorer.score(blank, scenes)
    assert score.background == 1.0
    assert score.glyphs <= 0.1
