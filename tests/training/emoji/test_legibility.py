"""The reader names what is drawn, and its shares fall with detail, with a wrong K and with wrong captions."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tdm_runtime.model.loaded_model import LoadedModel
from tests.training.run.killed import assert_resumes
from training.emoji.data.glyphs import load_glyphs
from training.emoji.data.scenes import Scene, caption
from training.emoji.report.legibility import Readings, alone, drawn, form_of, in_pairs, interval, known_parts, read
from training.emoji.report.reader import READER_FILE, GlyphReader, ReaderConfig, load_reader, train_reader
from training.emoji.report.samplers import pictures_with_k
from training.run.loop import LoopConfig

MAX_FILE_BYTES = 1_000_000
ALONE, PAIRS = alone(1), in_pairs(2)


@pytest.fixture(scope="module")
def reader() -> GlyphReader:
    assert READER_FILE.stat().st_size <= MAX_FILE_BYTES
    return load_reader()


@pytest.fixture(scope="module")
def known(reader: GlyphReader) -> NDArray[np.bool_]:
    return known_parts(reader, alone(4))


def test_drawings_are_named_and_those_of_other_captions_are_not(reader: GlyphReader, known: NDArray[np.bool_]) -> None:
    assert known.any(axis=1).all()
    assert known.mean() > 0.6
    whole, parts = shares(reader, drawn(ALONE, 1), ALONE, known)
    assert whole >= 0.99
    assert parts >= 0.95
    pictures = drawn(PAIRS, 1)
    assert read(reader, pictures, PAIRS).whole_right.mean() >= 0.99
    assert read(reader, [*pictures[1:], pictures[0]], PAIRS).whole_right.mean() <= 0.05


def test_parts_can_be_named_less_often_in_coarse_pictures(reader: GlyphReader, known: NDArray[np.bool_]) -> None:
    pictures = drawn(ALONE, 1)
    sharp, coarse_ones = (shares(reader, some, ALONE, known) for some in (pictures, [coarse(p, 16) for p in pictures]))
    assert sharp[1] > coarse_ones[1] + 0.08


def test_pictures_of_a_wrong_k_are_named_less_often(
    reader: GlyphReader, known: NDArray[np.bool_], model: LoadedModel
) -> None:
    scenes = ALONE[60::5]
    prompts = [caption(scene) for scene in scenes]
    right, wrong = (shares(reader, pictures_with_k(model, prompts, 1, k), scenes, known) for k in (1, 4))
    assert right[1] > wrong[1] + 0.05


def test_every_glyph_is_asked_equally_often() -> None:
    glyphs = load_glyphs()
    for scenes in (alone(4), in_pairs(4)):
        assert Counter(glyph for scene in scenes for glyph in scene.glyphs) == dict.fromkeys(glyphs, 4)
    assert len({scene.glyphs for scene in in_pairs(4)}) == 2 * len(glyphs)


def test_without_colours_only_glyphs_of_one_form_are_one() -> None:
    number = {glyph.name: n for n, glyph in enumerate(load_glyphs())}
    forms = {glyph.name: form_of(glyph) for glyph in load_glyphs()}
    assert forms["red heart"] == forms["black heart"] != forms["broken heart"]
    assert forms["red car"] != forms["blue car"]
    heart, blue, fox = (number[name] for name in ("red heart", "blue heart", "fox"))
    readings = Readings(np.array([heart]), np.array([blue]), np.array([[blue, heart, fox, fox]]))
    assert not readings.whole_right.any()
    assert readings.parts_right.tolist() == [[True, True, False, False]]
    known = np.ones((len(number), 4), dtype=bool)
    known[heart, 3] = False
    assert readings.shares(known).tolist() == [pytest.approx(2 / 3)]
    assert np.isnan(readings.shares(np.zeros_like(known))[0])


def test_intervals_are_wilsons() -> None:
    assert interval(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-3)
    assert interval(1.0, 10) == pytest.approx((0.7225, 1.0), abs=1e-3)


@pytest.mark.slow
def test_the_reader_resumes_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ReaderConfig(LoopConfig(steps=3, save_every_s=0.0), batch_size=2)
    assert_resumes(lambda folder: train_reader(folder, config), tmp_path, monkeypatch)


def test_the_error_for_a_missing_reader_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="train_reader"):
        load_reader(tmp_path / "none.safetensors")


def shares(
    reader: GlyphReader, pictures: list[np.ndarray], scenes: list[Scene], known: NDArray[np.bool_]
) -> tuple[float, float]:
    """Return the shares of whole glyphs and of known parts that are named."""
    readings = read(reader, pictures, scenes)
    return float(readings.whole_right.mean()), float(readings.shares(known).mean())


def coarse(picture: np.ndarray, side_px: int) -> np.ndarray:
    small = Image.fromarray(picture).resize((side_px, side_px), Image.Resampling.BOX)
    return np.asarray(small.resize((64, 64), Image.Resampling.BICUBIC))
