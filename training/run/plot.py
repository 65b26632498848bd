"""Pictures of a run: curves of its log and grids of its samples."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tdm_runtime.families.conditioning import Conditioning
from tdm_runtime.model.decoder import Pixels
from training.run.distill import Distiller
from training.run.loop import LOG_FILE

PLOT_FILE = "metrics.png"
STRIP_FRAMES = 5
"""Most frames of a clip in a grid, evenly from its first to its last."""
NOT_CURVES = frozenset({"step", "stage"})


def plot_log(folder: Path) -> Path:
    """Draw every number of `folder/log.jsonl` over the iterations, each in its own panel. Return the picture's file.

    Raises:
        FileNotFoundError: The folder has no log.
    """
    from matplotlib.figure import Figure

    rows = [json.loads(line) for line in (folder / LOG_FILE).read_text(encoding="utf-8").splitlines()]
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in NOT_CURVES]
    columns = min(3, len(names))
    figure = Figure(figsize=(4 * columns, 2.4 * -(-len(names) // columns)), layout="constrained")
    panels = figure.subplots(-(-len(names) // columns), columns, squeeze=False).ravel()
    for panel, name in zip(panels, names, strict=False):
        points = [(row["step"], row[name]) for row in rows if name in row]
        panel.plot(*zip(*points, strict=True), linewidth=1)
        panel.set_title(name, fontsize=9)
        panel.grid(alpha=0.3)
    for panel in panels[len(names) :]:
        panel.set_axis_off()
    figure.supxlabel("iteration", fontsize=9)
    figure.savefig(folder / PLOT_FILE, dpi=110)
    return folder / PLOT_FILE


class SampleGrid:
    """Grid of samples of a running distillation, always of the same prompts from the same noise."""

    def __init__(
        self,
        folder: Path,
        distiller: Distiller,
        conditioning: Conditioning,
        decode: Callable[[Tensor], Pixels],
    ) -> None:
        """Keep the prompts, and draw their noise.

        Args:
            decode: Function from latents [B, C, h, w] to pictures, uint8 [B, H, W, 3], or [B, C, F, h, w] to clips,
                uint8 [B, frames, H, W, 3].
        """
        self.folder, self.distiller, self.conditioning, self.decode = folder, distiller, conditioning, decode
        shape = (len(conditioning), *distiller.run.latent_shape)
        generator = torch.Generator().manual_seed(0)
        self.noise = torch.randn(shape, generator=generator).to(distiller.device)
        rows = max(distiller.trajectories.step_counts)
        self.renoise = torch.randn(shape[0], rows, *shape[1:], generator=generator).to(distiller.device)

    def draw(self, done: int) -> Path:
        """Write `folder/NNNNNN.png`: prompts down, K across. A clip is a strip of some of its frames."""
        renoise = self.renoise if self.distiller.config.samples_with_noise else None
        given = self.conditioning, renoise
        columns = [
            np.concatenate([_strip(one) for one in self.decode(self.distiller.sample(self.noise, k, *given))])
            for k in self.distiller.trajectories.step_counts
        ]
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"{done:06d}.png"
        Image.fromarray(np.concatenate(columns, axis=1)).save(file)
        return file


def _strip(sample: Pixels) -> Pixels:
    """Return a picture [H, W, 3] as it is; of a clip [frames, H, W, 3] at most `STRIP_FRAMES` frames, side by side."""
    if sample.ndim == 3:
        return sample
    frames = sample[np.linspace(0, len(sample) - 1, min(len(sample), STRIP_FRAMES)).round().astype(int)]
    return np.concatenate(list(frames), axis=1)
