"""Features for comparing pictures of scenes, from a small network that is trained here.

The network predicts the glyphs, the background and the layout, and also how soft and how noisy a picture
is. With the last two, the Frechet distance rises when pictures become soft or noisy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdm_runtime.model.decoder import Pixels
from training.emoji.data.glyphs import load_glyphs
from training.emoji.data.scenes import BACKGROUNDS, Scene, sample_scene
from training.emoji.report.networks import load_network, train_network
from training.emoji.stages.autoencoder import SceneRenderer, to_pixels
from training.measure.metrics import Features
from training.methods.precision import autocast
from training.run.loop import LoopConfig

STAGE = "features"
FEATURES_FILE = Path(__file__).with_name("features.safetensors")
FEATURE_DIM = 128
LAYOUTS: Mapping[str, int] = {
    "left of": 0,
    "right of": 0,
    "above": 1,
    "below": 1,
    "normal center": 2,
    "big center": 3,
    "small center": 4,
    "small left": 5,
    "small right": 6,
    "small top": 7,
    "small bottom": 8,
}
"""Relation of a pair, or size and place of a single glyph -> class. "A left of B" looks like "B right of A"."""
BACKGROUND_NAMES = tuple(sorted(BACKGROUNDS))
MAX_NOISE = 0.2
"""Deviation of the strongest noise in training, for pixels in [-1, 1]."""


@dataclass(frozen=True)
class FeatureConfig:
    """Settings of the feature network's training."""

    loop: LoopConfig = LoopConfig(steps=2500)
    batch_size: int = 64
    learning_rate: float = 2e-3
    corruption_weight: float = 1.0
    """Weight of the squared error in softness and noise, both 0..1."""
    ema_decay: float = 0.995


class FeatureNetwork(nn.Module):
    """Network of 0.27 M parameters: pixels [B, 3, 64, 64] in [-1, 1] -> features [B, 128] -> reading."""

    def __init__(self, glyphs: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_convolution(3, 32, stride=2),
            *_convolution(32, 64, stride=2),
            *_convolution(64, 64),
            *_convolution(64, 96, stride=2),
            *_convolution(96, 96),
            nn.AdaptiveAvgPool2d(2),  # one value for each quarter, so that places and relations stay apart
            nn.Flatten(),
            nn.Linear(4 * 96, FEATURE_DIM),
        )
        self.glyphs = nn.Linear(FEATURE_DIM, glyphs)
        self.background = nn.Linear(FEATURE_DIM, len(BACKGROUNDS))
        self.layout = nn.Linear(FEATURE_DIM, max(LAYOUTS.values()) + 1)
        self.corruption = nn.Linear(FEATURE_DIM, 2)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return features [B, 128], before the last activation."""
        features: Tensor = self.body(pixels)
        return features

    def read(self, pixels: Tensor) -> Reading:
        """Return the network's predictions."""
        active = F.silu(self(pixels))
        return Reading(self.glyphs(active), self.background(active), self.layout(active), self.corruption(active))


@dataclass(frozen=True)
class Reading:
    """Outputs of the network, or its targets with probabilities and indices instead of logits."""

    glyphs: Tensor
    """Logits [B, glyphs], or probabilities. In a pair, each glyph has probability 1/2."""
    background: Tensor
    """Logits [B, 10], or indices [B]."""
    layout: Tensor
    """Logits [B, 9], or indices [B]."""
    corruption: Tensor
    """Softness and noise [B, 2], 0..1."""


@dataclass(frozen=True)
class FeatureAccuracy:
    """Shares of held-out scenes that the network reads correctly, 0..1."""

    glyphs: float
    """Share of scenes with every glyph correct."""
    background: float
    layout: float


def layout_of(scene: Scene) -> int:
    """Return the class of a scene in `LAYOUTS`."""
    return LAYOUTS[scene.relation if len(scene.glyphs) == 2 else f"{scene.size} {scene.place}"]


def corrupt(pixels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Blur a random half of the pictures and add noise to a random half, each to a random degree.

    Args:
        pixels: Pixels [B, 3, H, W] in [-1, 1].

    Returns:
        The changed pixels, and the degrees of softness and noise [B, 2], 0..1.
    """
    count = len(pixels)
    is_hit = torch.rand(count, 2, generator=generator) < 0.5
    degrees = torch.rand(count, 2, generator=generator) * is_hit
    softness, noise = (column.view(-1, 1, 1, 1) for column in degrees.unbind(1))
    softened = pixels + softness * (blurred(pixels) - pixels)
    return softened + MAX_NOISE * noise * torch.randn(pixels.shape, generator=generator), degrees


def blurred(pixels: Tensor) -> Tensor:
    """Apply a binomial blur with a deviation of 1 pixel to [B, 3, H, W]."""
    row = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16.0
    kernel = torch.outer(row, row).expand(3, 1, 5, 5)
    return F.conv2d(F.pad(pixels, (2, 2, 2, 2), mode="replicate"), kernel, groups=3)


def reading_loss(reading: Reading, target: Reading, corruption_weight: float) -> Tensor:
    """Return the cross-entropy of glyphs, background and layout, plus the squared error of the corruption."""
    named = (
        F.cross_entropy(reading.glyphs.float(), target.glyphs)
        + F.cross_entropy(reading.background.float(), target.background)
        + F.cross_entropy(reading.layout.float(), target.layout)
    )
    return named + corruption_weight * F.mse_loss(reading.corruption.float(), target.corruption)


class SceneTargets:
    """Targets of the network, by scene."""

    def __init__(self) -> None:
        self._index = {glyph.name: n for n, glyph in enumerate(load_glyphs())}

    def of(self, scenes: Sequence[Scene], corruption: Tensor) -> Reading:
        """Return the targets of B scenes. corruption is [B, 2]."""
        glyphs = torch.zeros(len(scenes), len(self._index))
        for row, scene in enumerate(scenes):
            for glyph in scene.glyphs:
                glyphs[row, self._index[glyph.name]] = 1.0 / len(scene.glyphs)
        backgrounds = torch.tensor([BACKGROUND_NAMES.index(scene.background) for scene in scenes])
        layouts = torch.tensor([layout_of(scene) for scene in scenes])
        return Reading(glyphs, backgrounds, layouts, corruption)


def train_features(folder: Path, config: FeatureConfig = FeatureConfig()) -> None:
    """Train or resume. Write `folder/features.safetensors` in float16, to copy to `FEATURES_FILE`."""
    torch.manual_seed(config.loop.seed)
    renderer, targets = SceneRenderer(config.loop.seed), SceneTargets()
    model = FeatureNetwork(len(renderer.glyphs))

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        indices = range(step * config.batch_size, (step + 1) * config.batch_size)
        scenes = [sample_scene(renderer.glyphs, renderer.seed, index) for index in indices]
        pixels, degrees = corrupt(renderer.pixels(indices), generator)
        with autocast():
            reading = model.read(pixels)
        return reading_loss(reading, targets.of(scenes, degrees), config.corruption_weight)

    def evaluate(average: FeatureNetwork) -> dict[str, float]:
        accuracy = held_out_accuracy(average, renderer)
        return {"glyphs": accuracy.glyphs, "background": accuracy.background, "layout": accuracy.layout}

    train_network(folder / FEATURES_FILE.name, STAGE, model, config, loss_of, evaluate, evaluate_every=500)


def load_features(file: Path = FEATURES_FILE) -> FeatureNetwork:
    """Load the trained network in float32, in eval mode.

    Raises:
        FileNotFoundError: The file is missing. The message says how to make it.
    """
    trainer = "training.emoji.report.features.train_features"
    return load_network(FeatureNetwork(len(load_glyphs())), file, trainer, FEATURES_FILE.name)


@torch.no_grad()
def features_of(network: FeatureNetwork, pictures: Sequence[Pixels], batch_size: int = 128) -> Features:
    """Return the features of pictures uint8 [64, 64, 3], float64 [N, 128]."""
    batches = [
        network(to_pixels(np.stack(pictures[start : start + batch_size])))
        for start in range(0, len(pictures), batch_size)
    ]
    found: Features = torch.cat(batches).double().numpy()
    return found


@torch.no_grad()
def held_out_accuracy(network: FeatureNetwork, renderer: SceneRenderer, count: int = 256) -> FeatureAccuracy:
    """Measure the network on drawn scenes of held-out combinations."""
    scenes = [sample_scene(renderer.glyphs, renderer.seed, index, held_out=True) for index in range(count)]
    target = SceneTargets().of(scenes, torch.zeros(count, 2))
    reading = network.read(renderer.pixels(range(count), held_out=True))
    order = reading.glyphs.argsort(dim=1, descending=True)
    # A scene of n glyphs is read correctly if its glyphs are the n most likely ones.
    found = [
        set(row[: len(scene.glyphs)].tolist()) == set(wanted.nonzero().flatten().tolist())
        for row, scene, wanted in zip(order, scenes, target.glyphs, strict=True)
    ]
    return FeatureAccuracy(
        float(np.mean(found)),
        float((reading.background.argmax(1) == target.background).float().mean()),
        float((reading.layout.argmax(1) == target.layout).float().mean()),
    )


def _convolution(channels: int, outputs: int, stride: int = 1) -> tuple[nn.Module, ...]:
    return nn.Conv2d(channels, outputs, 3, stride, padding=1, bias=False), nn.GroupNorm(8, outputs), nn.SiLU()
