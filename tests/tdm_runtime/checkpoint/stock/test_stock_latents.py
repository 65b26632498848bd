"""Whole stock pipelines of tiny random models and our loop end at the same latents, from the seed alone.

The recipe is implied by the saved folder; the stock pipeline draws from one generator, ours from `SeedNoise`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from tdm_runtime.checkpoint.stock.implied_recipe import implied_recipe
from tdm_runtime.families import FAMILIES, denoiser_for
from tdm_runtime.families.family import TextEncoders
from tdm_runtime.sampling.noise import SeedNoise
from tdm_runtime.sampling.sampler import solve
from tests.tiny_pipelines import build_pipeline

PROMPT, SEED, SIZE = "a red square", 5, 64
SD15: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SD15_DDIM = {**SD15, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
TRAILING = {**SD15, "timestep_spacing": "trailing"}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 6.0}
TCD = {"eta": 0.3}
BINLESS = {"use_resolution_binning": False}
ONE_STEP = {**BINLESS, "num_inference_steps": 1}
DMD2 = {"timesteps": [999, 749, 499, 249]}
CASES = [
    # family, scheduler, arguments of the call beside four steps
    (
        "stable_diffusion",
        diffusers.DDIMScheduler(**SD15, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        {},
    ),
    ("stable_diffusion", diffusers.LCMScheduler(), {}),
    ("stable_diffusion", diffusers.TCDScheduler(), TCD),
    ("stable_diffusion", diffusers.DPMSolverMultistepScheduler(**SD15, steps_offset=1), {}),
    ("sdxl", diffusers.EulerDiscreteScheduler(**TRAILING), {}),
    ("sdxl", diffusers.EulerDiscreteScheduler(**SD15, timestep_spacing="leading", steps_offset=1), {}),
    ("sdxl", diffusers.EulerDiscreteScheduler(**TRAILING, use_karras_sigmas=True), {}),
    ("sdxl", diffusers.EulerAncestralDiscreteScheduler(**TRAILING), {}),
    ("sdxl", diffusers.LCMScheduler(), DMD2),
    ("sd3", diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), {}),
    ("sd3", diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), {"sigmas": [1.0, 0.9, 0.75, 0.5]}),
    ("sd3", diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), {}),
    ("pixart", diffusers.LCMScheduler(), BINLESS),
    ("pixart", diffusers.EulerAncestralDiscreteScheduler(**TRAILING), BINLESS),
    ("pixart", diffusers.DDIMScheduler(**SD15_DDIM, timestep_spacing="trailing"), ONE_STEP),
    ("sd3", diffusers.DPMSolverMultistepScheduler(**FLOW), {}),
]


@pytest.mark.parametrize(
    ("family_name", "scheduler", "arguments"),
    CASES,
    ids=[f"{family}-{type(s).__name__}-{n}" for n, (family, s, _) in enumerate(CASES)],
)
@torch.no_grad()
def test_latents_equal_the_stock_pipelines(
    family_name: str, scheduler: Any, arguments: dict[str, Any], tmp_path: Path
) -> None:
    family, pipeline = FAMILIES[family_name], build_pipeline(family_name)
    pipeline.scheduler = scheduler
    for part in (pipeline.scheduler, pipeline.vae, getattr(pipeline, family.denoiser_folder)):
        folder = {scheduler: "scheduler", pipeline.vae: "vae"}.get(part, family.denoiser_folder)
        part.save_pretrained(tmp_path / folder)
    lists = {name: arguments[name] for name in ("timesteps", "sigmas") if name in arguments}
    arguments = {"num_inference_steps": 4, **arguments}
    k = arguments["num_inference_steps"]
    steps = {} if lists else {"steps": [k]}
    recipe = implied_recipe(family, tmp_path, **steps, **lists, eta=arguments.get("eta", 0.0))

    pipeline.set_progress_bar_config(disable=True)
    stock = pipeline(
        PROMPT,
        width=SIZE,
        height=SIZE,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(SEED),
        output_type="latent",
        **arguments,
    ).images

    denoiser = denoiser_for(getattr(pipeline, family.denoiser_folder).eval())
    prompt = family.encode_prompts([PROMPT], TextEncoders(pipeline, denoiser.model.config, SIZE, SIZE))

    def predict(latents: Tensor, timesteps: Tensor) -> Tensor:
        output: Tensor = denoiser(latents, timesteps, None, *prompt.tensors())
        return output

    noise = SeedNoise(SEED, tuple(stock.shape))
    *_, (latents, _) = solve(recipe.step_table(k, SIZE, SIZE), noise.initial(), predict, noise.of_step)
    scale = stock.abs().max()
    torch.testing.assert_close(latents / scale, stock / scale, rtol=0, atol=3e-4)
