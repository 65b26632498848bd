"""Scenes composed from glyphs, with captions: background colour, size, position, two glyphs with a relation.

A scene is a pure function of (seed, index). So a killed run resumes on the same pictures, and the
scorer can draw the picture that a caption describes.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from training.emoji.data.glyphs import Glyph

BACKGROUNDS: Mapping[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (16, 16, 16),
    "gray": (136, 136, 136),
    "red": (214, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (250, 215, 60),
    "green": (40, 150, 70),
    "blue": (45, 95, 215),
    "purple": (125, 60, 180),
    "pink": (248, 160, 195),
}
"""Colour names of captions -> sRGB bytes. A caption without a colour means white."""

Place = Literal["center", "left", "right", "top", "bottom"]
Relation = Literal["left of", "right of", "above", "below"]
Size = Literal["small", "normal", "big"]

CENTERS: Mapping[Place, tuple[float, float]] = {
    "center": (0.5, 0.5),
    "left": (0.27, 0.5),
    "right": (0.73, 0.5),
    "top": (0.5, 0.27),
    "bottom": (0.5, 0.73),
}
"""Place -> (x, y) of the glyph's centre, in shares of the picture's side."""
SIDES: Mapping[Size, float] = {"small": 0.42, "normal": 0.68, "big": 0.88}
"""Size word -> side of the glyph, as a share of the picture's side."""
PAIR_SIDE = 0.46
"""Side of each glyph of a pair, as a share of the picture's side."""
HELD_OUT_ONE_IN = 10
"""One in this many combinations is held out."""


@dataclass(frozen=True)
class Placement:
    """Glyph with its place and size on the picture."""

    glyph: Glyph
    center: tuple[float, float]
    """(x, y) of the centre, in shares of the picture's side."""
    side: float
    """Side of the glyph, as a share of the picture's side."""


@dataclass(frozen=True)
class Scene:
    """Content of a picture, which a caption describes."""

    glyphs: tuple[Glyph, ...]
    """One or two glyphs."""
    background: str = "white"
    size: Size = "normal"
    """Size of a single glyph. All pairs have the same size."""
    place: Place = "center"
    """Place of a single glyph."""
    relation: Relation = "left of"
    """Relation of the first glyph to the second."""
    jitter: tuple[float, ...] = (0.0, 0.0, 1.0)
    """Shift to the right and down, in shares of the side, and scale factor. Captions do not mention it."""

    def placements(self) -> tuple[Placement, ...]:
        shift_x, shift_y, scale = self.jitter
        if len(self.glyphs) == 1:
            centers, side = [CENTERS[self.place]], SIDES[self.size]
        else:
            ends: dict[Relation, tuple[Place, Place]] = {
                "left of": ("left", "right"),
                "right of": ("right", "left"),
                "above": ("top", "bottom"),
                "below": ("bottom", "top"),
            }
            centers, side = [CENTERS[end] for end in ends[self.relation]], PAIR_SIDE
        return tuple(
            Placement(glyph, (x + shift_x, y + shift_y), side * scale)
            for glyph, (x, y) in zip(self.glyphs, centers, strict=True)
        )

    def is_held_out(self) -> bool:
        """Return whether training never sees this combination (a pair of glyphs, or a glyph and a background)."""
        names = sorted(glyph.name for glyph in self.glyphs)
        key = "+".join(names) if len(names) > 1 else f"{names[0]}@{self.background}"
        is_plain = len(names) == 1 and self.background == "white"
        return not is_plain and zlib.crc32(key.encode()) % HELD_OUT_ONE_IN == 0


def sample_scene(glyphs: tuple[Glyph, ...], seed: int, index: int, *, held_out: bool = False) -> Scene:
    """Return scene number `index` of the stream `seed`, from the training set or from the held-out set."""
    rng = random.Random(f"{seed}:{index}:{held_out}")
    while True:
        scene = _draw_scene(glyphs, rng)
        if scene.is_held_out() == held_out:
            return scene


def _draw_scene(glyphs: tuple[Glyph, ...], rng: random.Random) -> Scene:
    background = "white" if rng.random() < 0.3 else rng.choice(sorted(BACKGROUNDS))
    jitter = sample_jitter(rng)
    if rng.random() < 0.4:
        relations: tuple[Relation, ...] = ("left of", "right of", "above", "below")
        pair = tuple(rng.sample(glyphs, 2))
        return Scene(pair, background, relation=rng.choice(relations), jitter=jitter)
    scene = Scene((rng.choice(glyphs),), background, jitter=jitter)
    draw = rng.random()
    if draw < 0.5:
        return scene
    if draw < 0.65:
        return replace(scene, size="big")
    places: tuple[Place, ...] = ("center", "left", "right", "top", "bottom")
    return replace(scene, size="small", place=rng.choice(places))


def sample_jitter(rng: random.Random) -> tuple[float, ...]:
    """Draw a shift and a scale, as in `Scene.jitter`."""
    return rng.uniform(-0.015, 0.015), rng.uniform(-0.015, 0.015), rng.uniform(0.96, 1.04)


def caption(scene: Scene, rng: random.Random | None = None) -> str:
    """Describe a scene in words. With `rng` the wording varies. Without it the caption is the plainest one."""

    def choose(*wordings: str) -> str:
        return rng.choice(wordings) if rng is not None else wordings[0]

    def named(glyph: Glyph, size: Size = "normal") -> str:
        name = rng.choice(glyph.names) if rng is not None else glyph.name
        adjective = {"small": choose("small ", "little "), "normal": "", "big": choose("big ", "large ")}[size]
        phrase = adjective + name
        return choose(f"{article(phrase)} {phrase}", phrase)

    if len(scene.glyphs) == 1:
        words = named(scene.glyphs[0], scene.size)
        if scene.place in ("left", "right"):
            words += f" on the {scene.place}"
        elif scene.place in ("top", "bottom"):
            words += f" at the {scene.place}"
    else:
        first, second = (named(glyph) for glyph in scene.glyphs)
        relation = scene.relation
        if relation == "left of":
            relation = choose("left of", "to the left of", "and", "next to")  # type: ignore[assignment]
        elif relation == "right of":
            relation = choose("right of", "to the right of")  # type: ignore[assignment]
        elif relation == "above":
            relation = choose("above", "on top of", "over")  # type: ignore[assignment]
        else:
            relation = choose("below", "under")  # type: ignore[assignment]
        words = f"{first} {relation} {second}"
    return with_background(words, scene.background, rng)


def with_background(words: str, background: str, rng: random.Random | None = None) -> str:
    """Return a caption that also names the background. White, which no colour means too, is mostly left out."""
    if background == "white" and (rng is None or rng.choice(("unsaid", "unsaid", "said")) == "unsaid"):
        return words
    wordings = (
        f"{words} on {article(background)} {background} background",
        f"{words}, {background} background",
        f"{words} on {background}",
    )
    return rng.choice(wordings) if rng is not None else wordings[0]


def article(phrase: str) -> str:
    """Return the indefinite article of a phrase."""
    return "an" if phrase[0] in "aeiou" and not phrase.startswith(("unicorn", "ufo")) else "a"


def render(scene: Scene, pictures: Mapping[str, Image.Image], side_px: int = 64) -> NDArray[np.uint8]:
    """Draw a scene.

    Args:
        pictures: glyph name -> square RGBA picture.

    Returns:
        uint8 [H, W, 3], H = W = side_px.
    """
    canvas = Image.new("RGB", (side_px, side_px), BACKGROUNDS[scene.background])
    for placement in scene.placements():
        glyph_px = round(placement.side * side_px)
        picture = pictures[placement.glyph.name].resize((glyph_px, glyph_px), Image.Resampling.LANCZOS)
        corner = (round(c * side_px - glyph_px / 2) for c in placement.center)
        x, y = corner
        canvas.paste(picture, (x, y), picture)
    return np.asarray(canvas)
