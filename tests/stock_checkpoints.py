"""Folders that stock pipelines save: tiny random weights of the real classes, and the recipe that a user writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch

from tdm_runtime.recipe_cli import main as tdm_recipe
from tests.tiny_models import TEXT_TOKENS, tiny_wan
from tests.tiny_pipelines import build_pipeline, wan_vae

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
    parts: Callable[[], Mapping[str, Any]] = dict
    """Further or other parts and settings of the pipeline."""
    frames: tuple[int, ...] = ()
    """Numbers of frames to make; empty for pictures."""


def cogvideox(scheduler: Callable[..., Any], **settings: Any) -> Callable[[], Any]:
    given = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return lambda: scheduler(**given, **settings)


def second_expert() -> Mapping[str, Any]:
    expert = tiny_wan()
    draw = torch.Generator().manual_seed(1)
    for parameter in expert.parameters():
        parameter.data.mul_(1 + 0.5 * torch.randn(parameter.shape, generator=draw))
    return {"transformer_2": expert, "boundary_ratio": 0.875}


def wan_5b() -> Mapping[str, Any]:
    vae = wan_vae(
        is_residual=True, patch_size=2, in_channels=12, out_channels=12, scale_factor_spatial=16, decoder_base_dim=4
    )
    return {"vae": vae, "expand_timesteps": True}


def unipc(flow_shift: float) -> Callable[[], Any]:
    return lambda: diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift
    )


def flow(**settings: Any) -> Callable[[], Any]:
    return lambda: diffusers.FlowMatchEulerDiscreteScheduler(**settings)


NO_GUIDANCE = {"guidance_scale": 1.0}
NO_BINS = {"guidance_scale": 1.0, "use_resolution_binning": False}
COGVIDEOX_TEXT = {"guidance_scale": 1.0, "max_sequence_length": TEXT_TOKENS}
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
    "CogVideoX-2B": Case(
        "cogvideox", cogvideox(diffusers.CogVideoXDDIMScheduler), frames=(9, 17), options=COGVIDEOX_TEXT
    ),
    "CogVideoX-5B": Case(
        "cogvideox",
        cogvideox(diffusers.CogVideoXDPMScheduler, snr_shift_scale=1.0),
        frames=(1, 9),
        steps=(1, 4),
        options=COGVIDEOX_TEXT,
        changes={"use_rotary_positional_embeddings": True},
    ),
    "Wan 2.1": Case("wan", flow(shift=3.0), frames=(5, 9), options=NO_GUIDANCE),
    "Wan 2.1, UniPC": Case("wan", unipc(3.0), steps=(2, 5), frames=(1, 13), options=NO_GUIDANCE),
    "Wan 2.1, DPM-Solver++": Case(
        "wan",
        lambda: diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
        ),
        frames=(5, 9),
        options=NO_GUIDANCE,
    ),
    "Wan 2.2 A14B": Case("wan", flow(shift=5.0), steps=(1, 4), frames=(5, 9), options=NO_GUIDANCE, parts=second_expert),
    "Wan 2.2 5B": Case("wan", unipc(5.0), steps=(4,), frames=(5, 9), options=NO_GUIDANCE, parts=wan_5b),
    "AnimateDiff-Lightning": Case(
        "animatediff",
        lambda: diffusers.EulerDiscreteScheduler(**{**TRAILING, "beta_schedule": "linear"}),
        frames=(4, 7),
        options=NO_GUIDANCE,
    ),
    "AnimateLCM": Case(
        "animatediff",
        lambda: diffusers.LCMScheduler(**{**SD_BETAS, "beta_schedule": "linear"}),
        frames=(1, 16),
        options=NO_GUIDANCE,
    ),
}


def stock_pipeline(case: Case) -> Any:
    """Return the whole stock pipeline of a case."""
    pipeline = build_pipeline(case.family, **case.changes)
    pipeline = type(pipeline)(**{**pipeline.components, **case.parts()})
    pipeline.scheduler = case.scheduler()
    pipeline.register_modules(**dict.fromkeys(case.without))
    pipeline.set_progress_bar_config(disable=True)
    if case.family in ("sd3", "flux", "z_image"):
        pipeline.vae.register_to_config(scaling_factor=0.3611, shift_factor=0.1159)  # as published VAEs of 16 channels
    return pipeline


def write_recipe(case: Case, folder: Path, output: Path | None = None, *more: str) -> None:
    """Run `tdm-recipe` with the arguments of the stock call, for a folder that holds the pipeline.

    Args:
        output: folder of the recipe; None is that of the pipeline.
    """
    steps = () if "timesteps" in case.call else ("--steps", ",".join(map(str, case.steps)))
    file = (output or folder) / "tdm_recipe.json"
    assert tdm_recipe([str(folder), *steps, *case.recipe, *more, "-o", str(file)]) == 0


def save_checkpoint(case: Case, folder: Path) -> Path:
    """Save the pipeline of a case and its recipe. Returns the folder."""
    stock_pipeline(case).save_pretrained(folder)
    write_recipe(case, folder)
    return folder


PICTURES = tuple(name for name, case in CASES.items() if not case.frames)
"""Names of the cases that make pictures."""
CLIPS = tuple(name for name, case in CASES.items() if case.frames)
"""Names of the cases that make clips."""
