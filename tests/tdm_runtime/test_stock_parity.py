"""The same seed makes the same picture as the stock diffusers pipeline, for every family and solver.

Folders are saved by stock pipelines of the real classes with tiny random weights. A user runs `tdm-recipe` with the
arguments of the stock call, then `tdm-generate`. Equal pixels read 59 dB, because files hold whole levels.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from tdm_runtime.families import FAMILIES
from tdm_runtime.recipe_cli import main as tdm_recipe
from tests.lora_files import draw_weights, write_diffusers, write_kohya, write_peft
from tests.stock_checkpoints import CASES, CLIPS, PICTURES, Case, stock_pipeline, write_recipe
from tests.stock_pictures import (
    HEIGHT,
    MIN_PSNR_DB,
    WIDTH,
    clip,
    load_fp32,
    made_by,
    picture,
    psnr_db,
    stock_clip,
    stock_picture,
)
from tests.tiny_models import tiny_unet
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
    model = load_fp32(folder)
    for count in case.steps:
        for prompt in PROMPTS:
            theirs = picture_of_case(pipeline, case, prompt, count)
            assert psnr_db(made_by(model, prompt, count), theirs) >= MIN_PSNR_DB, (count, prompt)
    assert np.array_equal(picture(folder, prompt, count, tmp_path), made_by(model, prompt, count))


@pytest.mark.parametrize("name", CLIPS)
def test_the_clip_equals_that_of_the_stock_pipeline(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    pipeline, folder = stock_pipeline(case), tmp_path / "folder"
    pipeline.save_pretrained(folder)
    write_recipe(case, folder)
    model = load_fp32(folder)
    for count in case.steps:
        for frames, prompt in zip(case.frames, PROMPTS, strict=True):
            theirs = clip_of_case(pipeline, case, prompt, count, frames)
            ours = made_by(model, prompt, count, frames)
            assert ours.shape == (frames, HEIGHT, WIDTH, 3) and ours.std() > MIN_STD
            assert psnr_db(ours, theirs) >= MIN_CLIP_PSNR_DB, (count, frames)
    assert np.array_equal(clip(folder, prompt, count, frames, tmp_path), ours)


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
        ("CogVideoX-2B", write_diffusers),
        ("Wan 2.1", write_diffusers),
        ("AnimateDiff-Lightning", write_diffusers),
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
    plain = made(folder, case, PROMPTS[0], tmp_path)
    for scales in ((0.5,), (0.5, -0.7)):
        pipeline.set_adapters([str(n) for n in range(len(scales))], list(scales))
        theirs = stock_made(pipeline, case, PROMPTS[0])
        loras = [part for file, scale in zip(files, scales, strict=False) for part in ("--lora", f"{file}:{scale}")]
        ours = made(folder, case, PROMPTS[0], tmp_path, *loras)
        assert psnr_db(ours, theirs) >= MIN_PSNR_DB and psnr_db(ours, plain) < MIN_PSNR_DB - 10
    model = tmp_path / "model"
    model.mkdir()
    write_recipe(case, folder, model, *loras)
    assert np.array_equal(made(model, case, PROMPTS[0], tmp_path), ours)


def test_each_expert_of_wan_takes_its_lora(tmp_path: Path) -> None:
    case = replace(CASES["Wan 2.2 A14B"], steps=(4,))
    pipeline, folder = stock_pipeline(case), tmp_path / "folder"
    pipeline.save_pretrained(folder)
    write_recipe(case, folder)
    plain, given = made(folder, case, PROMPTS[0], tmp_path), list[str]()
    drawn = [{"transformer": draw_weights(pipeline, case.family, seed)["transformer"]} for seed in range(2)]
    files = [write_diffusers(pipeline, tmp_path / str(n), weights) for n, weights in enumerate(drawn)]
    for number, (second, file) in enumerate(zip((False, True), files, strict=True)):
        pipeline.load_lora_weights(
            file.parent, weight_name=file.name, adapter_name=str(number), load_into_transformer_2=second
        )
        given += ["--lora", f"{'transformer_2=' * second}{file}:0.5"]
        ours = made(folder, case, PROMPTS[0], tmp_path, *given)
        pipeline.transformer.set_adapters(["0"], [0.5])
        if second:
            pipeline.transformer_2.set_adapters(["1"], [0.5])
        theirs = stock_made(pipeline, case, PROMPTS[0])
        assert psnr_db(ours, theirs) >= MIN_PSNR_DB and psnr_db(ours, plain) < MIN_PSNR_DB - 10
        plain = ours
    model = tmp_path / "model"
    model.mkdir()
    write_recipe(case, folder, model, *given)
    assert np.array_equal(made(model, case, PROMPTS[0], tmp_path), ours)


def test_motion_modules_beside_a_unet_of_pictures_give_the_stock_pipelines_clip(tmp_path: Path) -> None:
    """Two ways to publish an AnimateDiff: the UNet of pictures with a MotionAdapter, or one UNet with all."""
    case, folder = CASES["AnimateDiff-Lightning"], tmp_path / "folder"
    unet, adapter = (
        tiny_unet(),
        diffusers.MotionAdapter(
            block_out_channels=(16, 32),
            motion_layers_per_block=1,
            motion_num_attention_heads=2,
            motion_norm_num_groups=8,
        ),
    )
    torch.manual_seed(1)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    parts = {**stock_pipeline(case).components, "unet": unet, "motion_adapter": adapter}
    diffusers.AnimateDiffPipeline(**parts).save_pretrained(folder)
    shutil.rmtree(folder / "unet")
    unet.save_pretrained(folder / "unet")
    index = json.loads((folder / "model_index.json").read_text())
    index["unet"] = ["diffusers", "UNet2DConditionModel"]
    (folder / "model_index.json").write_text(json.dumps(index))
    write_recipe(case, folder)
    pipeline = diffusers.AnimateDiffPipeline.from_pretrained(folder)
    theirs = clip_of_case(pipeline, case, PROMPTS[0], 2, 5)
    assert psnr_db(clip(folder, PROMPTS[0], 2, 5, tmp_path), theirs) >= MIN_CLIP_PSNR_DB


def test_tdms_cogvideox_goes_through_the_timesteps_that_it_was_trained_at(tmp_path: Path) -> None:
    """diffusers' DDIM always lands 1000 / K below: its table is changed so that the level there is the next one's."""
    case, folder = CASES["CogVideoX-2B"], tmp_path / "folder"
    pipeline = stock_pipeline(case)
    pipeline.save_pretrained(folder)
    file = folder / "tdm_recipe.json"
    assert tdm_recipe([str(folder), "--recipe", "tdm-cogvideox-2b", "-o", str(file)]) == 0
    scheduler, trained = pipeline.scheduler, (999, 856, 665, 399)
    levels = scheduler.alphas_cumprod.clone()
    for start, following in itertools.pairwise(trained):
        scheduler.alphas_cumprod[start - 250] = levels[following]
    scheduler.alphas_cumprod[trained[-1] - 250] = 1.0
    set_timesteps = scheduler.set_timesteps

    def set_trained(*arguments: Any, **options: Any) -> None:
        set_timesteps(*arguments, **options)
        scheduler.timesteps = torch.tensor(trained)

    scheduler.set_timesteps = set_trained
    for frames, prompt in zip(case.frames, PROMPTS, strict=True):
        theirs = clip_of_case(pipeline, case, prompt, 4, frames)
        assert psnr_db(clip(folder, prompt, 4, frames, tmp_path), theirs) >= MIN_CLIP_PSNR_DB


def made(folder: Path, case: Case, prompt: str, tmp_path: Path, *more: str) -> Any:
    """Return the picture or clip of `tdm-generate` with the first step count and the last number of frames."""
    if case.frames:
        return clip(folder, prompt, case.steps[0], case.frames[-1], tmp_path, *more)
    return picture(folder, prompt, case.steps[0], tmp_path, *more)


def stock_made(pipeline: Any, case: Case, prompt: str) -> Any:
    """Return the stock pipeline's picture or clip for `made`."""
    if case.frames:
        return clip_of_case(pipeline, case, prompt, case.steps[0], case.frames[-1])
    return picture_of_case(pipeline, case, prompt, case.steps[0])


def clip_of_case(pipeline: Any, case: Case, prompt: str, steps: int, frames: int) -> Any:
    """Return the clip of the stock pipeline as floats in [0, 1]."""
    return stock_clip(pipeline, prompt, frames, **(dict(case.call) or {"num_inference_steps": steps}), **case.options)


def picture_of_case(pipeline: Any, case: Case, prompt: str, steps: int) -> Any:
    """Return the picture of the stock pipeline as floats in [0, 1]."""
    call = dict(case.call) or {"num_inference_steps": steps}
    if case.family == "sana" and steps != 2:
        call["intermediate_timesteps"] = None
    return stock_picture(pipeline, prompt, **call, **case.options)
