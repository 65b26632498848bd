"""A grid of pictures of the served student and its teacher."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from tdm_runtime.model.choice import load_model
from training.emoji.data.text import GRID_PROMPTS
from training.emoji.report.samplers import samplers, teacher_of


def draw_grid(checkpoint: Path, run: Path, file: Path, prompts: Sequence[str] = GRID_PROMPTS, scale: int = 2) -> None:
    """Draw prompts down and samplers across. Each row has one seed."""
    found = {name: make(prompts, 0) for name, make in samplers(load_model(checkpoint), teacher_of(run)).items()}
    cell, gap, head = 64 * scale, 6, 40
    size = (len(found) * (cell + gap) + gap, head + len(prompts) * (cell + 20 + gap))
    grid = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(grid)
    font = ImageFont.load_default(size=11)
    for column, (name, pictures) in enumerate(found.items()):
        x = gap + column * (cell + gap)
        pen.multiline_text((x, 6), name.replace(", ", "\n", 1), fill="black", font=font)
        for row, picture in enumerate(pictures):
            large = Image.fromarray(picture).resize((cell, cell), Image.Resampling.BICUBIC)
            grid.paste(large, (x, head + row * (cell + 20 + gap) + 18))
    for row, prompt in enumerate(prompts):
        pen.text((gap, head + row * (cell + 20 + gap) + 2), prompt, fill="black", font=font)
    grid.save(file)
