"""The same seed makes the same picture as the stock diffusers pipeline, for every family and solver.

Folders are saved by stock pipelines of the real classes with tiny random weights. A user runs `tdm-recipe` with the
arguments of the stock call, then `tdm-generate`. Equal pixels read 59 dB, because files hold whole levels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest

from tdm_runtime.families import FAMILIES
from tdm_runtime.recipe_cli import main as tdm_recipe
from tests.lora_files import draw_weights, write_diffusers, write_kohya, write_peft
from tests.stock_pictures import MIN_PSNR_DB, picture, psnr_db, stock_picture
from tests.tiny_pipelines import build_pipeline

PROMPTS = ("A red Fox", "Two CATS on a hill")
SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TRAILING = {**SD_BETAS, "timestep_spacing": "trailing"}
DMD2 = (999, 749, 499, 249)


@dataclass(frozen=True)
class Case:
    """One kind of checkpoint, and the call that its user makes."""

    family: str
    scheduler: Callable[[], Any]
    steps: tuple[int, ...] = (1, 2, 4)
    recipe: tuple[str, ...] = ()
    """Arguments of `tdm-recipe` in place of --steps."""
    call: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the stock call in place of num_inference_steps."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of the stock call."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Changes of the tiny denoiser's config."""
    without: tuple[str, ...] = ()
    """Parts that the pipeline lacks."""


def flow(**settings: Any) -> Callable[[], Any]:
    return lambda: diffusers.FlowMatchEulerDiscreteScheduler(**settings)


NO_GUIDANCE = {"guidance_scale": 1.0}
NO_BINS = {"guidance_scale": 1.0, "use_resolution_binning": False}
DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "shift": 3.0}

CASES = {
    "SD 1.5, DDIM": Case(
        "stable_diffusion",
        lambda: diffusers.DDIMScheduler(**SD_BETAS, set_alpha_to_one=False, steps_offset=1, clip_sample=False),
        options=NO_GUIDANCE,
    ),
    "SD 1.5, TDM on DPM-Solver++": Case(
        "stable_diffusion", lambda: diffusers.DPMSolverMultistepScheduler(**SD_BETAS), options=NO_GUIDANCE
    ),
    "SD 2.1, v-prediction": Case(
        "stable_diffusion",
        lambda: diffusers.EulerDiscreteScheduler(**TRAILING, prediction_type="v_prediction"),
        options=NO_GUIDANCE,
    ),
    "SD 1.5, LCM": Case(
        "stable_diffusion",
        lambda: diffusers.LCMScheduler(**SD_BETAS),
        options={"guidance_scale": 8.0},
        changes={"time_cond_proj_dim": 8},
        recipe=("--guidance", "8"),
    ),
    "SD 1.5, TCD": Case(
        "stable_diffusion",
        lambda: diffusers.TCDScheduler(**SD_BETAS),
        recipe=("--eta", "0.3"),
        options={**NO_GUIDANCE, "eta": 0.3},
    ),
    "SDXL-Lightning": Case(
        "sdxl", lambda: diffusers.EulerDiscreteScheduler(**TRAILING), options={"guidance_scale": 0.0}
    ),
    "SDXL-Turbo": Case(
        "sdxl", lambda: diffusers.EulerAncestralDiscreteScheduler(**TRAILING), options={"guidance_scale": 0.0}
    ),
    "SDXL, DMD2": Case(
        "sdxl",
        lambda: diffusers.LCMScheduler(**SD_BETAS),
        steps=(4,),
        recipe=("--timesteps", ",".join(map(str, DMD2))),
        call={"timesteps": list(DMD2)},
        options={"guidance_scale": 0.0},
    ),
    "PixArt-alpha": Case(
        "pixart",
        lambda: diffusers.DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear"),
        steps=(2, 4),
        options=NO_BINS,
    ),
    "SD 3.5 Turbo": Case("sd3", flow(shift=3.0), options=NO_GUIDANCE),
    "SD 3.5 Turbo, no T5": Case(
        "sd3", flow(shift=3.0), steps=(4,), options=NO_GUIDANCE, without=("text_encoder_3", "tokenizer_3")
    ),
    "SD 3, TDM on DPM-Solver++": Case(
        "sd3",
        lambda: diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=6.0
        ),
        options=NO_GUIDANCE,
    ),
    "FLUX.1 schnell": Case("flux", flow(shift=1.0), options={"guidance_scale": 0.0, "max_sequence_length": 256}),
    "FLUX.1 dev": Case(
        "flux",
        flow(**DYNAMIC),
        steps=(4, 8),
        recipe=("--guidance", "2.5"),
        options={"guidance_scale": 2.5},
        changes={"guidance_embeds": True},
    ),
    "FLUX.2 klein": Case("flux2", flow(**DYNAMIC, time_shift_type="exponential"), steps=(1, 2, 4), options=NO_GUIDANCE),
    "Z-Image-Turbo": Case("z_image", flow(shift=3.0), steps=(4, 8), options={"guidance_scale": 0.0}),
    "SANA-Sprint": Case(
        "sana",
        diffusers.SCMScheduler,
        steps=(1, 2, 4),
        options={"use_resolution_binning": False},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_picture_equals_that_of_the_stock_pipeline(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = CASES[name]
    pipeline, folder = stock_folder(case, tmp_path / "folder")
    assert tdm_recipe([str(folder), *recipe_arguments(case, folder)]) == 0, capsys.readouterr().err
    for count in case.steps:
        for prompt in PROMPTS:
            theirs = picture_of_case(pipeline, case, prompt, count)
            assert psnr_db(picture(folder, prompt, count, tmp_path), theirs) >= MIN_PSNR_DB, (count, prompt)


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
    name: str, write: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One at scale 0.5, then two at once; the two again as a model folder of base, LoRAs and recipe."""
    case = replace(CASES[name], steps=(CASES[name].steps[-1],))
    pipeline, folder = stock_folder(case, tmp_path / "folder")
    assert tdm_recipe([str(folder), *recipe_arguments(case, folder)]) == 0, capsys.readouterr().err
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
    assert tdm_recipe([str(folder), *recipe_arguments(case, model), *loras]) == 0, capsys.readouterr().err
    assert np.array_equal(picture(model, PROMPTS[0], case.steps[0], tmp_path), ours)


def stock_folder(case: Case, folder: Path) -> tuple[Any, Path]:
    """Return the stock pipeline and the folder that it saved."""
    pipeline = build_pipeline(case.family, **case.changes)
    pipeline.scheduler = case.scheduler()
    pipeline.register_modules(**dict.fromkeys(case.without))
    pipeline.set_progress_bar_config(disable=True)
    if case.family in ("sd3", "flux", "z_image"):
        pipeline.vae.register_to_config(scaling_factor=0.3611, shift_factor=0.1159)  # as published VAEs of 16 channels
    pipeline.save_pretrained(folder)
    return pipeline, folder


def recipe_arguments(case: Case, folder: Path) -> list[str]:
    """Return the arguments of `tdm-recipe` that write the recipe of a call into a folder."""
    steps = () if "timesteps" in case.call else ("--steps", ",".join(map(str, case.steps)))
    return [*steps, *case.recipe, "-o", str(folder / "tdm_recipe.json")]


def picture_of_case(pipeline: Any, case: Case, prompt: str, steps: int) -> Any:
    """Return the picture of the stock pipeline as floats in [0, 1]."""
    call = dict(case.call) or {"num_inference_steps": steps}
    if case.family == "sana" and steps != 2:
        call["intermediate_timesteps"] = None
    return stock_picture(pipeline, prompt, **call, **case.options)
