"""Scores of clips: motion, glyph and background, by comparison with drawn clips.

The scorer draws every glyph in every motion on the captioned background. The nearest of these drawings, compared at
16x16 pixels in all frames, names the motion and the glyph of a clip. The colour along the border names the
background. Drawn clips with jitter score near 100%, and with shuffled captions near chance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tdm_runtime.model.decoder import Pixels
from training.emoji.data.scenes import BACKGROUNDS
from training.emoji.report.score import COMPARED_PX, load_atlas
from training.emoji_video.clips import MOTIONS, SIDE_PX, Clip, ClipRenderer, Motion, sample_clip, video_glyphs

BORDER_PX = 2


@dataclass(frozen=True)
class Verdict:
    """What a clip shows."""

    motion: Motion
    glyph: str
    background: str


@dataclass(frozen=True)
class ClipScore:
    """Shares of clips, 0..1, and their evenness."""

    motion: float
    """Share with the right motion."""
    glyph: float
    """Share with the right glyph."""
    background: float
    """Share with the right background."""
    unevenness: float
    """Root mean square of the second difference over frames, relative to that of the drawn clips. 1 is as smooth as
    drawn, and flicker raises it."""
    by_motion: Mapping[Motion, float]
    """Share with the right motion, by the motion of the caption."""


def scoring_clips(count: int, *, held_out: bool = False, seed: int = 1) -> list[Clip]:
    """Return clips without jitter, of the training kind or of held-out triples. Motions take turns."""
    clips = (sample_clip(video_glyphs(), seed, index, held_out=held_out) for index in range(count))
    return [Clip(clip.glyph, clip.background, clip.motion) for clip in clips]


class ClipScorer:
    """Compares clips with drawings. It keeps the drawings of each background."""

    def __init__(self) -> None:
        self.renderer = ClipRenderer(load_atlas())
        self._candidates = [(glyph, motion) for glyph in video_glyphs() for motion in MOTIONS]
        self._drawn: dict[str, NDArray[np.float32]] = {}

    def score(self, clips: Sequence[Pixels], asked: Sequence[Clip]) -> ClipScore:
        """Score clips, uint8 [F, H, W, 3] each, one for each caption."""
        verdicts = [self.judge(clip, wanted) for clip, wanted in zip(clips, asked, strict=True)]
        pairs = list(zip(verdicts, asked, strict=True))
        motions = np.array([seen.motion == wanted.motion for seen, wanted in pairs])
        kinds = np.array([wanted.motion for wanted in asked])
        jerk, drawn_jerk = (
            np.mean([_second_difference(clip) for clip in found])
            for found in (clips, [self.renderer.render(wanted) for wanted in asked])
        )
        return ClipScore(
            float(motions.mean()),
            float(np.mean([seen.glyph == wanted.glyph.name for seen, wanted in pairs])),
            float(np.mean([seen.background == wanted.background for seen, wanted in pairs])),
            float(np.sqrt(jerk / drawn_jerk)),
            {kind: float(motions[kinds == kind].mean()) for kind in MOTIONS if (kinds == kind).any()},
        )

    def judge(self, clip: Pixels, asked: Clip) -> Verdict:
        """Return what a clip shows, uint8 [F, H, W, 3]. Drawings have the background that the caption asks for."""
        if asked.background not in self._drawn:
            self._drawn[asked.background] = np.stack(
                [_small(self.renderer.render(Clip(g, asked.background, m))) for g, m in self._candidates]
            )
        errors = np.square(self._drawn[asked.background] - _small(clip)).mean(axis=(1, 2, 3, 4))
        glyph, motion = self._candidates[int(errors.argmin())]
        return Verdict(motion, glyph.name, border_colour(clip))


def border_colour(clip: Pixels) -> str:
    """Return the name of the colour along the border of all frames of a clip, uint8 [F, H, W, 3]."""
    inside = np.zeros(clip.shape[1:3], dtype=bool)
    inside[BORDER_PX:-BORDER_PX, BORDER_PX:-BORDER_PX] = True
    colour = np.median(clip[:, ~inside].reshape(-1, 3), axis=0)
    return min(BACKGROUNDS, key=lambda name: float(((colour - np.array(BACKGROUNDS[name])) ** 2).sum()))


def _small(clip: Pixels) -> NDArray[np.float32]:
    """Return frames at 16x16, float32 [F, 16, 16, 3] in 0..1."""
    factor = SIDE_PX // COMPARED_PX
    frames = clip.reshape(len(clip), COMPARED_PX, factor, COMPARED_PX, factor, 3)
    small: NDArray[np.float32] = frames.mean(axis=(2, 4), dtype=np.float32) / 255.0
    return small


def _second_difference(clip: Pixels) -> float:
    return float(np.square(np.diff(clip.astype(np.float32), n=2, axis=0)).mean())


def contact_sheet(clips: Sequence[Pixels], scale: int = 1) -> Image.Image:
    """Return a picture with clips down and their frames across. Clips are uint8 [F, H, W, 3]."""
    sheet = Image.fromarray(np.concatenate([np.concatenate(list(clip), axis=1) for clip in clips]))
    return sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.LANCZOS)
