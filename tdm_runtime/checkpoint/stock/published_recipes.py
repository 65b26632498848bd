"""Recipes of published few-step checkpoints, with what their source states and what was inferred.

An entry is the scheduler config and the arguments that the publisher's own example gives a stock pipeline; the recipe
follows as it does for a folder (`schedule`). `absent_recipes` says why others are missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tdm_runtime.checkpoint.stock.absent_recipes import why_absent
from tdm_runtime.checkpoint.stock.published_clips import CLIP_RECIPES
from tdm_runtime.checkpoint.stock.published_recipe import PublishedRecipe, Settings, flow_match_euler
from tdm_runtime.errors import RecipeError

_SD_BETAS: Settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_TRAILING: Settings = {**_SD_BETAS, "timestep_spacing": "trailing"}
_EULER_TRAILING: Settings = {**_TRAILING, "_class_name": "EulerDiscreteScheduler"}
_ANCESTRAL_TRAILING: Settings = {**_TRAILING, "_class_name": "EulerAncestralDiscreteScheduler"}
_DDIM_TRAILING: Settings = {
    **_TRAILING,
    "_class_name": "DDIMScheduler",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
_LCM: Settings = {**_SD_BETAS, "_class_name": "LCMScheduler"}
_TCD: Settings = {**_SD_BETAS, "_class_name": "TCDScheduler"}


def _dpm_flow(shift: float) -> Settings:
    return {
        "_class_name": "DPMSolverMultistepScheduler",
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": shift,
    }


SD, XL, LARGE = "stable_diffusion", "sdxl", (1024, 1024)
SMALL = (512, 512)

_LIGHTNING = PublishedRecipe(
    name="sdxl-lightning",
    family=XL,
    checkpoint="ByteDance/SDXL-Lightning",
    scheduler=_EULER_TRAILING,
    steps=(2, 4, 8),
    default_steps=4,
    size=LARGE,
    stated="Euler with trailing timesteps (scheduler configs of copies on the hub), no guidance",
    inferred="each step count has weights of its own: serve the one of yours",
)
_DMD2 = PublishedRecipe(
    name="dmd2-sdxl-4step",
    family=XL,
    checkpoint="tianweiy/DMD2",
    scheduler=_LCM,
    steps=(4,),
    default_steps=4,
    size=LARGE,
    timesteps=(999.0, 749.0, 499.0, 249.0),
    stated="LCMScheduler with timesteps 999, 749, 499, 249 and no guidance (README)",
    inferred="",
)
_TDM_SD3 = PublishedRecipe(
    name="tdm-sd3",
    family="sd3",
    checkpoint="Luo-Yihong/TDM_sd3_lora",
    scheduler=_dpm_flow(6.0),
    steps=(4,),
    default_steps=4,
    size=LARGE,
    lora_scale=0.125,
    stated="LoRA scale 0.125; DPMSolverMultistepScheduler on flow sigmas, flow_shift 6 (1 to 6 work), 4 steps",
    inferred="the other settings of SANA's scheduler config are the defaults",
)
_LCM_SD = PublishedRecipe(
    name="lcm-sd15",
    family=SD,
    checkpoint="SimianLuo/LCM_Dreamshaper_v7",
    scheduler=_LCM,
    steps=tuple(range(1, 9)),
    default_steps=4,
    size=(768, 768),
    guidance_scale=8.0,
    stated="LCMScheduler, guidance as an input of the UNet",
    inferred="1 to 8 steps, guidance 8.0 and the size, as remembered from its card",
)
_TCD_XL = PublishedRecipe(
    name="tcd-sdxl",
    family=XL,
    checkpoint="h1t/TCD-SDXL-LoRA",
    scheduler=_TCD,
    steps=(2, 3, 4, 5, 6, 7, 8),
    default_steps=4,
    size=LARGE,
    eta=0.3,
    lora_scale=1.0,
    stated="",
    inferred="TCDScheduler, 4 steps, no guidance, eta 0.3, as remembered from its card; step counts beside 4",
)
_HYPER = PublishedRecipe(
    name="hyper-sdxl-unified",
    family=XL,
    checkpoint="ByteDance/Hyper-SD, Hyper-SDXL-1step-lora",
    scheduler=_TCD,
    steps=tuple(range(1, 9)),
    default_steps=4,
    size=LARGE,
    eta=1.0,
    lora_scale=1.0,
    stated="",
    inferred="the code of several users: TCDScheduler, eta 1.0, guidance 0, 1 to 8 steps",
)
_HYPER_FIXED = replace(
    _HYPER,
    name="hyper-sdxl-fixed",
    checkpoint="ByteDance/Hyper-SD, Hyper-SDXL-{2,4,8}steps-lora",
    scheduler=_DDIM_TRAILING,
    steps=(2, 4, 8),
    eta=0.0,
    inferred="the code of several users: DDIM with trailing timesteps; each step count has its own LoRA. DDIM ends at "
    "the first alpha, as in the base model's config",
)
_SD_TURBO = PublishedRecipe(
    name="sd-turbo",
    family=SD,
    checkpoint="stabilityai/sd-turbo",
    scheduler=_EULER_TRAILING,
    steps=(1, 2, 3, 4),
    default_steps=1,
    size=SMALL,
    stated="",
    inferred="1 to 4 steps, no guidance, Euler with trailing timesteps, epsilon",
)
_Z_IMAGE = PublishedRecipe(
    name="z-image-turbo",
    family="z_image",
    checkpoint="Tongyi-MAI/Z-Image-Turbo",
    scheduler=flow_match_euler(3.0),
    steps=(8,),
    default_steps=8,
    size=LARGE,
    stated="8 calls of the model, static shift 3, no guidance",
    inferred="",
)
_SCHNELL = PublishedRecipe(
    name="flux.1-schnell",
    family="flux",
    checkpoint="black-forest-labs/FLUX.1-schnell",
    scheduler=flow_match_euler(1.0),
    steps=(1, 2, 3, 4),
    default_steps=4,
    size=LARGE,
    stated="1 to 4 steps, guidance 0",
    inferred="shift 1, static",
)

PUBLISHED: Mapping[str, PublishedRecipe] = {
    entry.name: entry
    for entry in (
        PublishedRecipe(
            name="tdm-dreamshaper-7",
            family=SD,
            checkpoint="Luo-Yihong/TDM_dreamshaper_LoRA",
            scheduler={**_SD_BETAS, "_class_name": "DPMSolverMultistepScheduler", "steps_offset": 1},
            steps=(4,),
            default_steps=4,
            size=SMALL,
            lora_scale=1.0,
            stated="DPMSolverMultistepScheduler made from SD 1.5's scheduler config, 4 steps, guidance 1",
            inferred="that config has no timestep_spacing, so the class's default, linspace",
        ),
        _TDM_SD3,
        replace(
            _TDM_SD3,
            name="tdm-sd3.5",
            checkpoint="Luo-Yihong/TDM_sd3-5_lora",
            stated="a LoRA for SD 3.5 medium",
            inferred="sampler and LoRA scale of tdm-sd3; the README has no example for it",
        ),
        _LCM_SD,
        replace(
            _LCM_SD,
            name="lcm-sdxl",
            family=XL,
            checkpoint="latent-consistency/lcm-sdxl",
            size=LARGE,
            inferred="2 to 8 steps and guidance 8.0, as remembered from its card",
            steps=tuple(range(2, 9)),
        ),
        replace(
            _LCM_SD,
            name="lcm-lora-sd15",
            checkpoint="latent-consistency/lcm-lora-sdv1-5",
            size=SMALL,
            guidance_scale=None,
            lora_scale=1.0,
            steps=tuple(range(2, 9)),
            stated="LCMScheduler, guidance 1 (none)",
            inferred="2 to 8 steps, as remembered from its card",
        ),
        replace(
            _LCM_SD,
            name="lcm-lora-sdxl",
            family=XL,
            checkpoint="latent-consistency/lcm-lora-sdxl",
            size=LARGE,
            guidance_scale=None,
            lora_scale=1.0,
            steps=tuple(range(2, 9)),
            stated="LCMScheduler, guidance 1 (none)",
            inferred="2 to 8 steps, as remembered from its card",
        ),
        _TCD_XL,
        replace(_TCD_XL, name="tcd-sd15", family=SD, checkpoint="h1t/TCD-SD15-LoRA", size=SMALL),
        _HYPER,
        replace(
            _HYPER,
            name="hyper-sd15-unified",
            family=SD,
            checkpoint="ByteDance/Hyper-SD, Hyper-SD15-1step-lora",
            size=SMALL,
        ),
        _HYPER_FIXED,
        replace(
            _HYPER_FIXED,
            name="hyper-sd15-fixed",
            family=SD,
            size=SMALL,
            checkpoint="ByteDance/Hyper-SD, Hyper-SD15-{2,4,8}steps-lora",
        ),
        _LIGHTNING,
        replace(
            _LIGHTNING,
            name="sdxl-lightning-1step",
            scheduler={**_EULER_TRAILING, "prediction_type": "sample"},
            steps=(1,),
            default_steps=1,
            inferred="this UNet predicts the sample, as remembered from its card",
        ),
        PublishedRecipe(
            name="sdxl-turbo",
            family=XL,
            checkpoint="stabilityai/sdxl-turbo",
            scheduler=_ANCESTRAL_TRAILING,
            steps=(1, 2, 3, 4),
            default_steps=1,
            size=SMALL,
            stated="Euler ancestral with trailing timesteps (its scheduler config), no guidance, 1 to 4 steps",
            inferred="",
        ),
        _SD_TURBO,
        PublishedRecipe(
            name="instaflow",
            family=SD,
            checkpoint="XCLiu/instaflow_0_9B_from_sd_1_5",
            scheduler=flow_match_euler(1.0),
            steps=(1,),
            default_steps=1,
            size=SMALL,
            output_sign=-1,
            stated="one step from timestep 1000, latents plus the predicted velocity, guidance 0 (code/pipeline_rf.py "
            "and code/README.md of gnobitab/InstaFlow)",
            inferred="its scheduler scales the initial noise by 1, as that of SD 1.5",
        ),
        _DMD2,
        replace(
            _DMD2,
            name="dmd2-sdxl-1step",
            steps=(1,),
            default_steps=1,
            timesteps=(399.0,),
            stated="",
            inferred="LCMScheduler at timestep 399",
        ),
        _Z_IMAGE,
        replace(
            _Z_IMAGE,
            name="tdm-r1-z-image",
            checkpoint="Luo-Yihong/TDM-R1",
            steps=(4,),
            default_steps=4,
            lora_scale=1.0,
            stated="4 calls of the model, on Z-Image-Turbo",
            inferred="its list of sigmas, 1, 0.9, 0.75, 0.5",
        ),
        _SCHNELL,
        replace(
            _SCHNELL,
            name="flux.2-klein",
            family="flux2",
            checkpoint="black-forest-labs/FLUX.2-klein-4B",
            scheduler={"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True},
            stated="distilled to 4 steps (is_distilled); sigmas shifted by size and steps",
            inferred="step counts below 4",
        ),
        PublishedRecipe(
            name="sd3.5-large-turbo",
            family="sd3",
            checkpoint="stabilityai/stable-diffusion-3.5-large-turbo",
            scheduler=flow_match_euler(3.0),
            steps=(4,),
            default_steps=4,
            size=LARGE,
            stated="",
            inferred="4 steps, guidance 0, shift 3; stock diffusers then runs sigmas 1, 0.858, 0.602, 0.009",
        ),
        PublishedRecipe(
            name="sana-sprint",
            family="sana",
            checkpoint="Efficient-Large-Model/Sana_Sprint_*_1024px_diffusers",
            scheduler={"_class_name": "SCMScheduler"},
            steps=(1, 2, 3, 4),
            default_steps=2,
            size=LARGE,
            guidance_scale=4.5,
            stated="SCMScheduler, 2 steps with the intermediate angle 1.3, guidance 4.5 as an input of the model",
            inferred="",
        ),
        *CLIP_RECIPES,
    )
}
"""Name -> recipe."""


def published_for(family: str) -> list[PublishedRecipe]:
    """Return the recipes of a family."""
    return [entry for entry in PUBLISHED.values() if entry.family == family]


def published_recipe(name: str) -> PublishedRecipe:
    """Return a recipe by name.

    Raises:
        RecipeError: there is none.
    """
    if name in PUBLISHED:
        return PUBLISHED[name]
    if (why := why_absent(name)) is not None:
        raise RecipeError(f"recipe {name!r} is not built in: {why}")
    raise RecipeError(f"recipe {name!r} is not built in; built in are {', '.join(PUBLISHED)}")
