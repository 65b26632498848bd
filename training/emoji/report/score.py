"""Prompt adherence and fidelity of pictures, by comparison with the scenes of their captions.

Adherence: the scorer cuts the picture at the places of the scene and compares each cut with every glyph of
the atlas, drawn in the same way. A picture adheres if each cut is nearest to the right glyph and the border
has the right colour. Drawn scenes score 100%, and with shuffled captions they score 0%.

Fidelity: a caption fixes its scene except for a small jitter. So the picture is compared, pixel by pixel,
with the scene drawn at every jitter, and the nearest drawing counts. Fidelity still separates samplers
that all have full adherence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tdm_runtime.model.decoder import Pixels
from tdm_runtime.model.similarity import psnr_db
from training.emoji.data.glyphs import load_glyphs, render_glyphs
from training.emoji.data.scenes import BACKGROUNDS, Placement, Scene, render, sample_scene

ATLAS_FILE = Path(__file__).with_name("glyphs.webp")
ATLAS_CELL_PX = 64
ATLAS_COLUMNS = 16
COMPARED_PX = 16
"""Side at which cuts are compared, so that sharpness and a shift of one pixel matter little."""
SHIFTS_PX = (-2, 0, 2)
JITTER_SHIFTS = (-0.0125, 0.0, 0.0125)
"""Shifts in shares of the side. With the scales they reach nearly every whole-pixel drawing of a jittered scene."""
JITTER_SCALES = (0.965, 0.983, 1.0, 1.017, 1.035)
MAX_PSNR_DB = float(20 * np.log10(255))
"""PSNR of a mean square error of one level of 255; closer pictures count as this close."""


@dataclass(frozen=True)
class Score:
    """Shares of pictures, 0..1, and fidelity."""

    glyphs: float
    """Share with every glyph right, at its place."""
    background: float
    """Share with the right background."""
    adherence: float
    """Share with both right."""
    psnr_db: float
    """Peak signal-to-noise ratio to the nearest drawing, decibels, at most 48.1, averaged over pictures."""


def write_atlas(file: Path = ATLAS_FILE) -> None:
    """Draw every glyph into one picture, so that scoring works without the font."""
    glyphs = load_glyphs()
    pictures = render_glyphs(glyphs)
    rows = -(-len(glyphs) // ATLAS_COLUMNS)
    atlas = Image.new("RGBA", (ATLAS_COLUMNS * ATLAS_CELL_PX, rows * ATLAS_CELL_PX))
    for n, glyph in enumerate(glyphs):
        cell = pictures[glyph.name].resize((ATLAS_CELL_PX, ATLAS_CELL_PX), Image.Resampling.LANCZOS)
        atlas.paste(cell, _cell_corner(n))
    atlas.save(file, "WEBP", quality=80, method=6)


def load_atlas(file: Path = ATLAS_FILE) -> Mapping[str, Image.Image]:
    """Load the atlas: glyph name -> square RGBA picture."""
    atlas = Image.open(file).convert("RGBA")
    cells = {}
    for n, glyph in enumerate(load_glyphs()):
        x, y = _cell_corner(n)
        cells[glyph.name] = atlas.crop((x, y, x + ATLAS_CELL_PX, y + ATLAS_CELL_PX))
    return cells


def _cell_corner(n: int) -> tuple[int, int]:
    return (n % ATLAS_COLUMNS * ATLAS_CELL_PX, n // ATLAS_COLUMNS * ATLAS_CELL_PX)


def scoring_scenes(count: int, *, held_out: bool = False, seed: int = 1) -> list[Scene]:
    """Return scenes without jitter, from the training distribution or from held-out combinations."""
    glyphs = load_glyphs()
    scenes = (sample_scene(glyphs, seed, index, held_out=held_out) for index in range(count))
    return [Scene(s.glyphs, s.background, s.size, s.place, s.relation) for s in scenes]


class Scorer:
    """Compares pictures with the scenes of their captions."""

    def __init__(self, atlas: Mapping[str, Image.Image] | None = None) -> None:
        self.atlas = atlas or load_atlas()
        self._names = sorted(self.atlas)
        self._references: dict[tuple[int, str], NDArray[np.float32]] = {}
        self._drawn_scenes: dict[tuple[Scene, int], Pixels] = {}

    def score(self, pictures: Sequence[Pixels], scenes: Sequence[Scene]) -> Score:
        """Score uint8 [H, W, 3] pictures, one for each scene."""
        rows = [
            (all(self.nearest_glyph(picture, p, scene) == p.glyph.name for p in scene.placements()),
             nearest_background(picture) == scene.background)
            for picture, scene in zip(pictures, scenes, strict=True)
        ]  # fmt: skip
        hits = np.array(rows)
        fidelity = [self.psnr_db(picture, scene) for picture, scene in zip(pictures, scenes, strict=True)]
        return Score(
            float(hits[:, 0].mean()), float(hits[:, 1].mean()), float(hits.all(1).mean()), float(np.mean(fidelity))
        )

    def psnr_db(self, picture: Pixels, scene: Scene) -> float:
        """Return the peak signal-to-noise ratio of a picture, uint8 [H, H, 3], to the nearest drawing, decibels."""
        side_px = picture.shape[0]
        return min(MAX_PSNR_DB, max(psnr_db(picture, drawing) for drawing in self._drawings(scene, side_px)))

    def _drawings(self, scene: Scene, side_px: int) -> Pixels:
        """Draw a scene at every jitter, uint8 [N, H, W, 3], and keep it: many samplers are scored on a scene."""
        key = (scene, side_px)
        if key not in self._drawn_scenes:
            self._drawn_scenes[key] = np.stack([self.draw(drawn, side_px) for drawn in jittered(scene, side_px)])
        return self._drawn_scenes[key]

    def nearest_glyph(self, picture: Pixels, placement: Placement, scene: Scene) -> str:
        """Return the name of the glyph that the picture shows at a placement."""
        left, top, box_px = placed_box(placement, picture.shape[0])
        references = self._drawn(box_px, scene.background)
        best = np.full(len(self._names), np.inf)
        source = Image.fromarray(picture)
        for dx in SHIFTS_PX:
            for dy in SHIFTS_PX:
                box = (left + dx, top + dy, left + dx + box_px, top + dy + box_px)
                best = np.minimum(best, ((references - _compared(source.crop(box))) ** 2).mean(axis=(1, 2, 3)))
        return self._names[int(best.argmin())]

    def _drawn(self, box_px: int, background: str) -> NDArray[np.float32]:
        """Return every glyph on a background, each filling a box, [N, 16, 16, 3]."""
        key = (box_px, background)
        if key not in self._references:
            drawn = []
            for name in self._names:
                box = Image.new("RGB", (box_px, box_px), BACKGROUNDS[background])
                glyph = self.atlas[name].resize((box_px, box_px), Image.Resampling.LANCZOS)
                box.paste(glyph, (0, 0), glyph)
                drawn.append(_compared(box))
            self._references[key] = np.stack(drawn)
        return self._references[key]

    def draw(self, scene: Scene, side_px: int = 64) -> Pixels:
        """Draw the picture of a scene."""
        return render(scene, self.atlas, side_px)


def placed_box(placement: Placement, side_px: int) -> tuple[int, int, int]:
    """Return left, top and side of a glyph in whole pixels, as `render` places it."""
    box_px = round(placement.side * side_px)
    left, top = (round(c * side_px - box_px / 2) for c in placement.center)
    return left, top, box_px


def jittered(scene: Scene, side_px: int) -> list[Scene]:
    """Return the scene at every jitter that gives a different picture at this size."""
    found = {}
    for x, y, scale in product(JITTER_SHIFTS, JITTER_SHIFTS, JITTER_SCALES):
        moved = replace(scene, jitter=(x, y, scale))
        found[tuple(placed_box(placement, side_px) for placement in moved.placements())] = moved
    return list(found.values())


def nearest_background(picture: Pixels) -> str:
    """Return the name of the colour along the picture's border."""
    border = np.concatenate([picture[:2].reshape(-1, 3), picture[-2:].reshape(-1, 3),
                             picture[:, :2].reshape(-1, 3), picture[:, -2:].reshape(-1, 3)])  # fmt: skip
    colour = np.median(border, axis=0)
    return min(BACKGROUNDS, key=lambda name: float(((colour - np.array(BACKGROUNDS[name])) ** 2).sum()))


def _compared(cut: Image.Image) -> NDArray[np.float32]:
    small = cut.resize((COMPARED_PX, COMPARED_PX), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32) / 255.0
