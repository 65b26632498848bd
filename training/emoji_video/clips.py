"""Clips of moving glyphs, with captions: glyph, background and motion.

A clip is a pure function of (seed, index), so a killed run resumes on the same clips, and the scorer can draw
the clip that a caption describes. Each motion is visible in single frames: a glyph that moves right is at the left
edge in the first frame and at the right edge in the last one. So the mean picture of every frame number differs
between motions, which is what a denoiser can learn from nearly pure noise.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from training.emoji.data.glyphs import Glyph, load_glyphs
from training.emoji.data.scenes import BACKGROUNDS, HELD_OUT_ONE_IN, article, with_background

FRAMES = 9
FPS = 8
SIDE_PX = 64
GLYPH_NAMES = (
    "red heart", "star", "crescent moon", "lightning", "rainbow", "sunflower", "cactus", "evergreen tree",
    "mushroom", "red apple", "banana", "strawberry", "hamburger", "pizza", "doughnut", "cat face",
    "dog face", "fox", "panda", "frog", "penguin", "butterfly", "turtle", "octopus",
    "tropical fish", "grinning face", "ghost", "robot", "skull", "crown", "red car", "rocket",
)  # fmt: skip
"""Names of the glyphs that clips show, a subset of the picture model's."""

Motion = Literal[
    "still",
    "moving right",
    "moving left",
    "moving up",
    "moving down",
    "growing",
    "shrinking",
    "spinning",
    "fading in",
]
"""Motions, by their words in captions."""
MOTIONS: tuple[Motion, ...] = get_args(Motion)
REVERSED: tuple[Motion, ...] = ("moving left", "moving down", "shrinking")
"""Motions that are another one played backwards."""
DIRECTIONS: Mapping[Motion, tuple[int, int]] = {
    "moving right": (1, 0),
    "moving left": (-1, 0),
    "moving up": (0, -1),
    "moving down": (0, 1),
}
"""Direction of each glide, (x, y), with y downwards."""
GLIDE_FROM, GLIDE_SIDE = 0.3, 0.42
"""Distance of a glide's first and last centre from the middle, and side of its glyph, in shares of the side."""
REST_SIDE = 0.62
SIZE_RANGE = (0.22, 0.86)
"""Smallest and largest side of growing and shrinking glyphs, in shares of the side."""
MAX_SHIFT, MAX_SCALE = 0.03, 0.05
"""Greatest jitter of place and size."""
MIP_SIDES_PX = (128, 64, 32, 16)


@dataclass(frozen=True)
class Pose:
    """Glyph in one frame."""

    center: tuple[float, float]
    """(x, y) of the centre, in shares of the side."""
    side: float
    """Side of the glyph, as a share of the side."""
    angle: float = 0.0
    """Clockwise turn, radians."""
    alpha: float = 1.0
    """Opacity, 0..1."""


@dataclass(frozen=True)
class Clip:
    """Content of a clip, which a caption describes."""

    glyph: Glyph
    background: str
    motion: Motion
    jitter: tuple[float, float, float] = (0.0, 0.0, 1.0)
    """Shift to the right and down, in shares of the side, and scale factor. Captions do not mention it."""

    def pose(self, frame: int) -> Pose:
        """Return the pose in frame `frame`, 0..FRAMES - 1."""
        return pose_at(self.motion, frame / (FRAMES - 1), self.jitter)

    def is_held_out(self) -> bool:
        """Return whether training never sees this triple of glyph, motion and background."""
        key = f"{self.glyph.name}@{self.background}@{self.motion}"
        return zlib.crc32(key.encode()) % HELD_OUT_ONE_IN == 0


def pose_at(motion: Motion, share: float, jitter: tuple[float, float, float]) -> Pose:
    """Return the pose after `share` of the clip's time, 0..1."""
    shift_x, shift_y, scale = jitter
    center = (0.5 + shift_x, 0.5 + shift_y)
    small, large = SIZE_RANGE
    if motion in DIRECTIONS:
        along = GLIDE_FROM * (2.0 * share - 1.0)
        x, y = DIRECTIONS[motion]
        return Pose((center[0] + x * along, center[1] + y * along), GLIDE_SIDE * scale)
    if motion == "growing":
        return Pose(center, (small + (large - small) * share) * scale)
    if motion == "shrinking":
        return Pose(center, (large + (small - large) * share) * scale)
    if motion == "spinning":  # a whole turn takes FRAMES frames, so that the clip loops
        turn = 2.0 * np.pi * (FRAMES - 1) / FRAMES
        return Pose(center, REST_SIDE * scale, angle=turn * share)
    return Pose(center, REST_SIDE * scale, alpha=share if motion == "fading in" else 1.0)


def video_glyphs() -> tuple[Glyph, ...]:
    """Return the glyphs that clips show."""
    known = {glyph.name: glyph for glyph in load_glyphs()}
    return tuple(known[name] for name in GLYPH_NAMES)


def sample_clip(glyphs: tuple[Glyph, ...], seed: int, index: int, *, held_out: bool = False) -> Clip:
    """Return clip number `index` of the stream `seed`, from the training set or from the held-out set.

    Motions take turns, so that any run of clips has each equally often.
    """
    rng = random.Random(f"{seed}:{index}:{held_out}")
    while True:
        jitter = (
            rng.uniform(-MAX_SHIFT, MAX_SHIFT),
            rng.uniform(-MAX_SHIFT, MAX_SHIFT),
            rng.uniform(1 - MAX_SCALE, 1 + MAX_SCALE),
        )
        clip = Clip(rng.choice(glyphs), rng.choice(sorted(BACKGROUNDS)), MOTIONS[index % len(MOTIONS)], jitter)
        if clip.is_held_out() == held_out:
            return clip


def caption(clip: Clip, rng: random.Random | None = None) -> str:
    """Describe a clip in words. With `rng` the wording varies. Without it the caption is the plainest one."""
    name = rng.choice(clip.glyph.names) if rng is not None else clip.glyph.name
    with_article = f"{article(name)} {name}"
    words = f"{with_article if rng is None else rng.choice((with_article, name))} {clip.motion}"
    return with_background(words, clip.background, rng)


class ClipRenderer:
    """Draws clips. It keeps each glyph at several sizes, so that small drawings are smooth."""

    def __init__(self, pictures: Mapping[str, Image.Image]) -> None:
        """Prepare square RGBA pictures, by glyph name."""
        self._mips = {name: _mips(picture) for name, picture in pictures.items()}

    def render(self, clip: Clip) -> NDArray[np.uint8]:
        """Draw a clip, uint8 [F, H, W, 3]."""
        return np.stack([self.frame(clip, clip.pose(n)) for n in range(FRAMES)])

    def frame(self, clip: Clip, pose: Pose) -> NDArray[np.uint8]:
        """Draw the glyph of a clip in one pose, at sub-pixel places, uint8 [H, W, 3]."""
        side_px = pose.side * SIDE_PX
        source = next((mip for mip in reversed(self._mips[clip.glyph.name]) if mip.width >= side_px),
                      self._mips[clip.glyph.name][0])  # fmt: skip
        zoom = source.width / side_px
        cos, sin = zoom * np.cos(pose.angle), zoom * np.sin(pose.angle)
        x, y = (c * SIDE_PX for c in pose.center)
        middle = source.width / 2
        inverse = (cos, sin, middle - cos * x - sin * y, -sin, cos, middle + sin * x - cos * y)
        drawn = source.transform((SIDE_PX, SIDE_PX), Image.Transform.AFFINE, inverse, Image.Resampling.BILINEAR)
        ink = np.asarray(drawn, dtype=np.float32)
        opacity = pose.alpha * ink[..., 3:] / 255.0
        colour = np.array(BACKGROUNDS[clip.background], dtype=np.float32)
        # The colours are premultiplied by the glyph's own opacity.
        pixels = pose.alpha * ink[..., :3] + (1.0 - opacity) * colour
        return pixels.round().clip(0, 255).astype(np.uint8)


def _mips(picture: Image.Image) -> list[Image.Image]:
    """Return a glyph at falling sizes, with premultiplied colours and a clear border for the interpolation."""
    mips = []
    for side_px in MIP_SIDES_PX:
        ink = np.asarray(picture.resize((side_px - 4, side_px - 4), Image.Resampling.LANCZOS), dtype=np.float32)
        premultiplied = np.zeros((side_px, side_px, 4), np.uint8)
        premultiplied[2:-2, 2:-2, :3] = (ink[..., :3] * ink[..., 3:] / 255.0).round()
        premultiplied[2:-2, 2:-2, 3] = ink[..., 3]
        mips.append(Image.fromarray(premultiplied, "RGBA"))
    return mips
