"""A network that names the glyph in a cut of a picture, or in a part of it. It is trained here on drawings alone.

It shares nothing with the generator or with the features of the Frechet distance, and it never sees a generated
picture. In most of its training it sees only a window of the glyph, and in half of it no colours.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from tdm_runtime.model.decoder import Pixels
from training.emoji.data.glyphs import load_glyphs
from training.emoji.data.scenes import Placement, Scene, render, sample_scene
from training.emoji.report.features import corrupt
from training.emoji.report.networks import load_network, train_network
from training.emoji.report.score import load_atlas, placed_box
from training.emoji.stages.autoencoder import to_pixels
from training.methods.precision import autocast, fastest_precision
from training.run.loop import LoopConfig

STAGE = "reader"
READER_FILE = Path(__file__).with_name("reader.safetensors")
CUT_PX = 40
"""Side to which cuts are scaled, about that of the usual glyph on 64 pixels."""
WINDOW_PX = 16
"""Side of the part of a cut that `parts` leaves visible."""
WINDOW_CORNERS_PX = (0, 12, 24)
"""Left or upper edges of the parts, three across and three down."""
MARGIN_PX = 2
"""Margin of a cut around its glyph's place, for the jitter of drawings."""
LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in brightness (ITU-R BT.601)."""


@dataclass(frozen=True)
class ReaderConfig:
    """Settings of the reader's training."""

    loop: LoopConfig = LoopConfig(steps=3000, seed=7)
    batch_size: int = 48
    """Scenes in an iteration. A scene has one or two glyphs."""
    learning_rate: float = 2e-3
    ema_decay: float = 0.995
    gain: float = 0.15
    """Greatest change of each colour's contrast, as a share."""
    offset: float = 0.1
    """Greatest change of each colour's brightness, for pixels in [-1, 1]."""


class GlyphReader(nn.Module):
    """Network of 0.35 M parameters: cuts [B, 3, 40, 40] in [-1, 1] -> logits [B, glyphs]."""

    def __init__(self, glyphs: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_convolution(3, 32, stride=2),
            *_convolution(32, 64, stride=2),
            *_convolution(64, 64),
            *_convolution(64, 96, stride=2),
            *_convolution(96, 96),
            nn.AdaptiveAvgPool2d(3),  # parts keep their places: a glyph is always upright
            nn.Flatten(),
        )
        self.head = nn.Linear(9 * 96, glyphs)

    def forward(self, cuts: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(cuts))
        return logits


def cut_out(picture: Pixels, placement: Placement) -> Pixels:
    """Return the surroundings of a placement, uint8 [40, 40, 3], from a picture uint8 [H, W, 3]."""
    left, top, side = placed_box(placement, picture.shape[0])
    padded = np.pad(picture, ((MARGIN_PX,) * 2, (MARGIN_PX,) * 2, (0, 0)), mode="edge")
    box = (left, top, left + side + 2 * MARGIN_PX, top + side + 2 * MARGIN_PX)
    return np.asarray(Image.fromarray(padded).crop(box).resize((CUT_PX, CUT_PX), Image.Resampling.BICUBIC))


def without_colours(cuts: Tensor) -> Tensor:
    """Return the brightness of cuts [B, 3, H, W], in all three channels."""
    luma = torch.tensor(LUMA, dtype=cuts.dtype).view(1, 3, 1, 1)
    return (cuts * luma).sum(1, keepdim=True).expand_as(cuts)


def parts(cuts: Tensor) -> Tensor:
    """Return each cut [B, 3, 40, 40] nine times with one part visible, [B, 9, 3, 40, 40]. The rest is gray."""
    shown = torch.zeros(len(cuts), len(WINDOW_CORNERS_PX) ** 2, *cuts.shape[1:])
    for n, (top, left) in enumerate(product(WINDOW_CORNERS_PX, WINDOW_CORNERS_PX)):
        window = (..., slice(top, top + WINDOW_PX), slice(left, left + WINDOW_PX))
        shown[:, n][window] = cuts[window]
    return shown


def with_windows(cuts: Tensor, generator: torch.Generator) -> Tensor:
    """Hide all but a random window, of random size from that of a part, of most cuts [B, 3, H, W]."""
    count, side = len(cuts), cuts.shape[-1]
    size = WINDOW_PX + (side - WINDOW_PX) * torch.rand(count, generator=generator) ** 2
    size = torch.where(torch.rand(count, generator=generator) < 0.2, side, size).round()
    start = (torch.rand(2, count, generator=generator) * (side - size + 1)).floor()
    place = torch.arange(side).view(1, 1, side)
    rows, columns = ((place >= start[..., None]) & (place < (start + size)[..., None])).unbind(0)
    return cuts * (rows[:, None, :, None] & columns[:, None, None, :])


def disguise(cuts: Tensor, config: ReaderConfig, generator: torch.Generator) -> Tensor:
    """Change cuts [B, 3, H, W] so that they still show the same: blur, noise, colours off, a part."""
    count = len(cuts)
    gain = 1 + config.gain * (2 * torch.rand(count, 3, 1, 1, generator=generator) - 1)
    offset = config.offset * (2 * torch.rand(count, 3, 1, 1, generator=generator) - 1)
    coloured, _ = corrupt(gain * cuts + offset, generator)
    is_grey = torch.rand(count, 1, 1, 1, generator=generator) < 0.5
    return with_windows(torch.where(is_grey, without_colours(coloured), coloured), generator)


class DrawnCuts:
    """Cuts of drawn scenes with the numbers of their glyphs."""

    def __init__(self, seed: int) -> None:
        self.seed, self.glyphs, self.pictures = seed, load_glyphs(), load_atlas()
        self._number = {glyph.name: n for n, glyph in enumerate(self.glyphs)}

    def of(self, indices: range, *, held_out: bool = False) -> tuple[Tensor, Tensor]:
        """Return every glyph of scenes: cuts [N, 3, 40, 40] in [-1, 1], as placed without jitter, and numbers [N]."""
        cuts, numbers = [], []
        for index in indices:
            scene = sample_scene(self.glyphs, self.seed, index, held_out=held_out)
            picture = render(scene, self.pictures)
            for placement in Scene(
                scene.glyphs, scene.background, scene.size, scene.place, scene.relation
            ).placements():
                cuts.append(cut_out(picture, placement))
                numbers.append(self._number[placement.glyph.name])
        return to_pixels(np.stack(cuts)), torch.tensor(numbers)


def train_reader(folder: Path, config: ReaderConfig = ReaderConfig()) -> None:
    """Train or resume. Write `folder/reader.safetensors` in float16, to copy to `READER_FILE`."""
    torch.manual_seed(config.loop.seed)
    drawn = DrawnCuts(config.loop.seed)
    model = GlyphReader(len(drawn.glyphs))
    precision = fastest_precision()

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        cuts, numbers = drawn.of(range(step * config.batch_size, (step + 1) * config.batch_size))
        with autocast(precision=precision):
            logits = model(disguise(cuts, config, generator))
        return F.cross_entropy(logits.float(), numbers)

    def evaluate(average: GlyphReader) -> dict[str, float]:
        cuts, numbers = drawn.of(range(256), held_out=True)
        in_parts = average(parts(without_colours(cuts)).flatten(0, 1)).argmax(1).view(-1, 9) == numbers[:, None]
        return {
            "whole": float((average(cuts).argmax(1) == numbers).float().mean()),
            "parts": float(in_parts.float().mean()),
        }

    train_network(folder / READER_FILE.name, STAGE, model, config, loss_of, evaluate, evaluate_every=250)


def load_reader(file: Path = READER_FILE) -> GlyphReader:
    """Load the trained network in float32, in eval mode.

    Raises:
        FileNotFoundError: The file is missing. The message says how to make it.
    """
    trainer = "training.emoji.report.reader.train_reader"
    return load_network(GlyphReader(len(load_glyphs())), file, trainer, READER_FILE.name)


def _convolution(channels: int, outputs: int, stride: int = 1) -> tuple[nn.Module, ...]:
    return nn.Conv2d(channels, outputs, 3, stride, padding=1, bias=False), nn.GroupNorm(8, outputs), nn.SiLU()
