"""The same seed makes the same picture as the stock diffusers pipeline, for every family and solver.

Folders are saved by stock pipelines of the real classes with tiny random weights. A user runs `tdm-recipe` with the
arguments of the stock call, then `tdm-generate`. Equal pixels read 59 dB, because files hold whole levels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tdm_runtime.cli import main as tdm_generate
from tests.stock_checkpoints import CASES, stock_pipeline, write_recipe

MIN_PSNR_DB = 50.0
SEED = 7
WIDTH, HEIGHT = 96, 64
PROMPTS = ("A red Fox", "Two CATS on a hill")


@pytest.mark.parametrize("name", CASES)
def test_the_picture_equals_that_of_the_stock_pipeline(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    pipeline, folder = stock_pipeline(case), tmp_path / "folder"
    pipeline.save_pretrained(folder)
    write_recipe(case, folder)

    for count in case.steps:
        for prompt in PROMPTS:
            call = dict(case.call) or {"num_inference_steps": count}
            if case.family == "sana" and count != 2:
                call["intermediate_timesteps"] = None
            theirs = pipeline(
                prompt=prompt,
                width=WIDTH,
                height=HEIGHT,
                generator=torch.Generator("cpu").manual_seed(SEED),
                output_type="np",
                **call,
                **case.options,
            ).images[0]
            assert psnr_db(picture(folder, prompt, count, tmp_path), theirs) >= MIN_PSNR_DB, (count, prompt)


def picture(folder: Path, prompt: str, steps: int, tmp_path: Path) -> Any:
    """Return the picture of `tdm-generate` as floats in [0, 1]."""
    file = tmp_path / "picture.png"
    sizes = ["--seed", str(SEED), "--steps", str(steps), "--size", f"{WIDTH}x{HEIGHT}"]
    backend = ["--backend", "torch", "--precision", "fp32"]
    assert tdm_generate(["--checkpoint", str(folder), prompt, *sizes, *backend, "-o", str(file)]) == 0
    return np.asarray(Image.open(file).convert("RGB")) / 255.0


def psnr_db(ours: Any, theirs: Any) -> float:
    return float(-10 * np.log10(np.mean((ours - theirs) ** 2)))
