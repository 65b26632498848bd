"""Fidelity ranks good pictures above soft ones, and soft ones above wrong ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from training.emoji.data.glyphs import load_glyphs
from training.emoji.data.scenes import sample_scene
from training.emoji.report.score import Scorer, scoring_scenes

COUNT = 40
GLYPHS = load_glyphs()
DRAWN_FLOOR_DB = 40.0
"""Lower bound for drawn scenes with any jitter. Without jitter they reach the cap of 48.1."""


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return Scorer()


def blurred(picture: np.ndarray, radius: float) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(radius)))


def test_fidelity_falls_with_softness_and_most_with_a_wrong_glyph(scorer: Scorer) -> None:
    scenes = scoring_scenes(COUNT)
    drawn = [scorer.draw(sample_scene(GLYPHS, 1, index)) for index in range(COUNT)]  # the same scenes, jittered
    others = [replace(s, glyphs=tuple(GLYPHS[(GLYPHS.index(g) + 50) % len(GLYPHS)] for g in s.glyphs)) for s in scenes]
    exact = scorer.score([scorer.draw(scene) for scene in scenes], scenes).psnr_db
    jittered = scorer.score(drawn, scenes).psnr_db
    soft = scorer.score([blurred(picture, 0.6) for picture in drawn], scenes).psnr_db
    softer = scorer.score([blurred(picture, 1.2) for picture in drawn], scenes).psnr_db
    wrong = scorer.score([scorer.draw(scene) for scene in others], scenes).psnr_db
    print(f"exact {exact:.1f}, jittered {jittered:.1f}, soft {soft:.1f}, softer {softer:.1f}, wrong {wrong:.1f} dB")
    assert exact == pytest.approx(48.13, abs=0.01)
    assert jittered > DRAWN_FLOOR_DB
    assert jittered > soft + 5 > softer + 7
    assert softer > wrong + 5
