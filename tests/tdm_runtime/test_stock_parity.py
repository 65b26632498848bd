"""The same seed makes the same picture as the stock diffusers pipeline, for every family and solver.

Folders are saved by stock pipelines of the real classes with tiny random weights. A user runs `tdm-recipe` with the
arguments of the stock call, then `tdm-generate`. Equal pixels read 59 dB, because files hold whole levels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tdm_runtime.families import FAMILIES
from tests.lora_files import draw_weights, write_diffusers, write_kohya, write_peft
from tests.stock_checkpoints import CASES, CLIPS, PICTURES, Case, stock_pipeline, write_recipe
from tests.stock_pictures import HEIGHT, MIN_PSNR_DB, WIDTH, clip, picture, psnr_db, stock_clip, stock_picture
from tests.tiny_pipelines import build_pipeline

MIN_CLIP_PSNR_DB = 57.0
"""Least similarity of clips: another prompt leaves 53 dB to the tiny CogVideoX."""
MIN_STD = 0.02
"""Least standard deviation of a clip's pixels, in [0, 1]: equal grey would prove nothing."""
PROMPTS = ("A red Fox", "Two CATS on a hill")


@pytest.mark.parametrize("name", PICTURES)
def test_the_picture_equals_that_of_the_stock_pipeline(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    pipeline, folder = stock_pipeline(case), tmp_path / "folder"
    pipeline.save_pretrained(folder)
    write_recipe(case, folder)
    for count in case.steps:
        for prompt in PROMPTS:
            theirs = picture_of_case(pipeline, case, prompt, count)
            assert psnr_db(picture(folder, prompt, count, tmp_path), theirs) >= MIN_PSNR_DB, (count, prompt)


@pytest.mark.parametrize("name", CLIPS)
def test_the_clip_equals_that_of_the_stock_pipeline(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    pipeline, folder = stock_pipeline(case), tmp_path / "folder"
    pipeline.save_pretrained(folder)
    write_recipe(case, folder)
    for count in case.steps:
        for frames, prompt in zip(case.frames, PROMPTS, strict=True):
            theirs = clip_of_case(pipeline, case, prompt, count, frames)
            ours = clip(folder, prompt, count, frames, tmp_path)
            assert ours.shape == (frames, HEIGHT, WIDTH, 3) and ours.std() > MIN_STD
            assert psnr_db(ours, theirs) >= MIN_CLIP_PSNR_DB, (count, frames)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("SD 1.5, DDIM", write_kohya),
        ("SDXL-Lightning", write_kohya),
        ("SDXL-Lightning", write_diffusers),
        ("SD 3.5 Turbo", write_diffusers),
        ("FLUX.1 schnell", write_peft),
        ("FLUX.2 klein", write_diffusers),
        ("Z-Image-Turbo", write_diffusers),
        ("SANA-Sprint", write_diffusers),
    ],
)
def test_loras_change_the_picture_as_in_the_stock_pipeline(
    name: str, write: Callable[..., Path], tmp_path: Path
) -> None:
    """One at scale 0.5, then two at once; the two again as a model folder of base, LoRAs and recipe."""
    case = replace(CASES[name], steps=(CASES[name].steps[-1],))
    pipeline, folder = stock_pipeline(case), tmp_path / "folder"
    pipeline.save_pretrained(folder)
    write_recipe(case, folder)
    part = FAMILIES[case.family].denoiser_folder
    files, stock_files = [], []
    for number in range(2):
        weights = draw_weights(pipeline, case.family, seed=number)
        if write is write_peft:  # holds the denoiser only
            weights = {part: weights[part]}
        stock_files.append(write_diffusers(pipeline, tmp_path / f"stock {number}", weights))
        files.append(write(build_pipeline(case.family, **case.changes), tmp_path / f"lora {number}", weights))
    for number, stock_file in enumerate(stock_files):
        pipeline.load_lora_weights(stock_file.parent, weight_name=stock_file.name, adapter_name=str(number))
    plain = picture(folder, PROMPTS[0], case.steps[0], tmp_path)
    for scales in ((0.5,), (0.5, -0.7)):
        pipeline.set_adapters([str(n) for n in range(len(scales))], list(scales))
        theirs = picture_of_case(pipeline, case, PROMPTS[0], case.steps[0])
        loras = [part for file, scale in zip(files, scales, strict=False) for part in ("--lora", f"{file}:{scale}")]
        ours = picture(folder, PROMPTS[0], case.steps[0], tmp_path, *loras)
        assert psnr_db(ours, theirs) >= MIN_PSNR_DB and psnr_db(ours, plain) < MIN_PSNR_DB - 10
    model = tmp_path / "model"
    model.mkdir()
    write_recipe(case, folder, model, *loras)
    assert np.array_equal(picture(model, PROMPTS[0], case.steps[0], tmp_path), ours)


def clip_of_case(pipeline: Any, case: Case, prompt: str, steps: int, frames: int) -> Any:
    """Return the clip of the stock pipeline as floats in [0, 1]."""
    return stock_clip(pipeline, prompt, frames, **(dict(case.call) or {"num_inference_steps": steps}), **case.options)


def picture_of_case(pipeline: Any, case: Case, prompt: str, steps: int) -> Any:
    """Return the picture of the stock pipeline as floats in [0, 1]."""
    call = dict(case.call) or {"num_inference_steps": steps}
    if case.family == "sana" and steps != 2:
        call["intermediate_timesteps"] = None
    return stock_picture(pipeline, prompt, **call, **case.options)
