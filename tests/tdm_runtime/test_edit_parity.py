"""The same seed edits a picture as the img2img and inpaint pipelines of diffusers do, for families that have them."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from tdm_runtime.edit import Edit
from tdm_runtime.model.loaded_model import LoadedModel
from tdm_runtime.params import SamplingParams
from tdm_runtime.pipeline import generate
from tests.stock_checkpoints import CASES, Case, stock_pipeline, write_recipe
from tests.stock_pictures import HEIGHT, MIN_PSNR_DB, SEED, WIDTH, load_fp32, psnr_db
from tests.tiny_pipelines import kl_vae

PROMPT = "A red Fox"
IMG2IMG = {
    "stable_diffusion": diffusers.StableDiffusionImg2ImgPipeline,
    "sdxl": diffusers.StableDiffusionXLImg2ImgPipeline,
    "sd3": diffusers.StableDiffusion3Img2ImgPipeline,
    "flux": diffusers.FluxImg2ImgPipeline,
    "z_image": diffusers.ZImageImg2ImgPipeline,
    "sana": diffusers.SanaSprintImg2ImgPipeline,
}
INPAINT = {
    "stable_diffusion": diffusers.StableDiffusionInpaintPipeline,
    "sdxl": diffusers.StableDiffusionXLInpaintPipeline,
    "sd3": diffusers.StableDiffusion3InpaintPipeline,
    "flux": diffusers.FluxInpaintPipeline,
}
"""Family -> its stock pipeline."""
NOT_EDITED = ("SD 3, TDM on DPM-Solver++",)
"""Stock pipelines of SD3 need scale_noise of a scheduler, which DPM-Solver++ lacks."""
OF_IMG2IMG = tuple(name for name, case in CASES.items() if case.family in IMG2IMG and name not in NOT_EDITED)
OF_INPAINT = tuple(name for name, case in CASES.items() if case.family in INPAINT and name not in NOT_EDITED)


def given_picture() -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return a smooth picture, uint8 [H, W, 3]."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    waves = np.stack([np.sin(x / 9), np.cos(y / 7), np.sin((x + y) / 11)], axis=-1)
    return np.asarray((127.5 + 100 * waves).round().astype(np.uint8))


def mask() -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return a mask whose edges lie between latents of every family."""
    found = np.zeros((HEIGHT, WIDTH), np.uint8)
    found[16:48, 32:80] = 255
    return found


def loaded(case: Case, folder: Path, **vae: float) -> tuple[Any, LoadedModel]:
    """Save the stock pipeline of a case, with changes of its VAE's config. Return it, and our model of the folder."""
    pipeline = stock_pipeline(case)
    pipeline.vae.register_to_config(**vae)
    pipeline.save_pretrained(folder)
    write_recipe(case, folder)
    return pipeline, load_fp32(folder)


def stock_edit(kind: Any, pipeline: Any, case: Case, strength: float, **pictures: Any) -> Any:
    """Return the edit of a stock pipeline as floats in [0, 1]."""
    parts = {name: part for name, part in pipeline.components.items() if name in inspect.signature(kind).parameters}
    stock = kind(**parts)
    stock.set_progress_bar_config(disable=True)
    takes = inspect.signature(stock.__call__).parameters
    sizes = {name: value for name, value in (("width", WIDTH), ("height", HEIGHT)) if name in takes}
    options = {**(case.call or {"num_inference_steps": case.steps[-1]}), **case.options}
    if "intermediate_timesteps" in takes:
        options["intermediate_timesteps"] = None
    noise = torch.Generator("cpu").manual_seed(SEED)
    return stock(
        prompt=PROMPT, strength=strength, generator=noise, output_type="np", **sizes, **pictures, **options
    ).images[0]


@pytest.mark.parametrize("name", OF_IMG2IMG)
def test_an_edited_picture_equals_that_of_the_stock_pipeline(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    pipeline, model = loaded(case, tmp_path / "folder")
    for strength in (0.5, 1.0):
        edit = Edit(given_picture(), strength)
        ours = generate(model, SamplingParams(PROMPT, SEED, case.steps[-1], WIDTH, HEIGHT, edit=edit)) / 255.0
        theirs = stock_edit(IMG2IMG[case.family], pipeline, case, strength, image=Image.fromarray(given_picture()))
        assert psnr_db(ours, theirs) >= MIN_PSNR_DB, strength
        assert psnr_db(ours, given_picture() / 255.0) < 40


@pytest.mark.parametrize("name", OF_INPAINT)
def test_a_masked_edit_equals_that_of_the_stock_pipeline(name: str, tmp_path: Path) -> None:
    """Stock pipelines return the whole decoded picture; ours keeps the given one outside of the mask."""
    case = CASES[name]
    vae = {}
    if case.family == "sd3":  # the stock pipeline takes 16 channels only, and forgets shift_factor when it decodes
        channels = {"in_channels": 16, "out_channels": 16}
        case = replace(case, changes=channels, parts=lambda: {"vae": kl_vae(latent_channels=16)})
        vae = {"shift_factor": 0.0}
    pipeline, model = loaded(case, tmp_path / "folder", **vae)
    for strength in (0.5, 1.0):
        edit = Edit(given_picture(), strength, mask())
        ours = generate(model, SamplingParams(PROMPT, SEED, case.steps[-1], WIDTH, HEIGHT, edit=edit))
        theirs = stock_edit(
            INPAINT[case.family],
            pipeline,
            case,
            strength,
            image=Image.fromarray(given_picture()),
            mask_image=Image.fromarray(mask()),
        )
        inside = mask() > 0
        assert psnr_db(ours[inside] / 255.0, theirs[inside]) >= MIN_PSNR_DB, strength
        outside = np.ones_like(inside)
        outside[12:52, 28:84] = False  # the soft edge
        assert np.array_equal(ours[outside], given_picture()[outside])
        assert not np.array_equal(ours[inside], given_picture()[inside])
