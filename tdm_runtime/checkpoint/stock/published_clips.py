"""Recipes of published few-step checkpoints that make clips (`published_recipes`)."""

from __future__ import annotations

from dataclasses import replace

from tdm_runtime.checkpoint.stock.published_recipe import PublishedRecipe, Settings, flow_match_euler

_SHIFT_5 = (1000.0, 937.5, 2500.0 / 3.0, 625.0)
"""1, 3/4, 1/2 and 1/4 after a shift of 5."""
_LINEAR: Settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "linear"}

_LIGHTNING = PublishedRecipe(
    name="wan2.2-lightning",
    family="wan",
    checkpoint="lightx2v/Wan2.2-Lightning, T2V-A14B",
    scheduler=flow_match_euler(5.0),
    steps=(4,),
    default_steps=4,
    size=(832, 480),
    trained_timesteps=_SHIFT_5,
    lora_scale=1.0,
    stated="4 steps, shift 5, no guidance, Euler; a LoRA for each expert",
    inferred="",
)
_FAST = PublishedRecipe(
    name="fastwan2.1-1.3b",
    family="wan",
    checkpoint="FastVideo/FastWan2.1-T2V-1.3B-Diffusers",
    scheduler={**flow_match_euler(8.0), "stochastic_sampling": True},
    steps=(3,),
    default_steps=3,
    size=(832, 480),
    trained_timesteps=(1000.0, 757.0, 522.0),
    stated="timesteps 1000, 757, 522, each step adds fresh noise, no guidance (FastVideo's pipeline config)",
    inferred="trained with sparse attention, which stock transformers do not have",
)

CLIP_RECIPES = (
    PublishedRecipe(
        name="tdm-cogvideox-2b",
        family="cogvideox",
        checkpoint="Luo-Yihong/TDM_CogVideoX-2B_LoRA",
        scheduler={
            "_class_name": "CogVideoXDDIMScheduler",
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
            "snr_shift_scale": 3.0,
            "timestep_spacing": "trailing",
        },
        steps=(4,),
        default_steps=4,
        size=(720, 480),
        trained_timesteps=(999.0, 856.0, 665.0, 399.0),
        lora_scale=1.0,
        stated="trained at timesteps 999, 856, 665, 399; evenly spaced ones may be worse; guidance 1 (README)",
        inferred="DDIM from each timestep to the next, LoRA scale 1",
    ),
    _LIGHTNING,
    replace(
        _LIGHTNING,
        name="wan2.1-distill",
        checkpoint="lightx2v/Wan2.1-T2V-14B-StepDistill-CfgDistill",
        lora_scale=None,
        stated="4 steps, shift 5, no guidance (LightX2V's configs)",
        inferred="whole weights, or a LoRA at scale 1",
    ),
    _FAST,
    replace(
        _FAST,
        name="fastwan2.2-5b",
        checkpoint="FastVideo/FastWan2.2-TI2V-5B-FullAttn-Diffusers",
        scheduler={**flow_match_euler(5.0), "stochastic_sampling": True},
        size=(1280, 704),
        inferred="",
    ),
    replace(
        _LIGHTNING,
        name="wan2.1-self-forcing",
        checkpoint="gdhe17/Self-Forcing, run as one chunk of all frames",
        scheduler={**flow_match_euler(5.0), "stochastic_sampling": True},
        lora_scale=None,
        stated="timesteps 1000, 750, 500, 250 before a shift of 5; each step adds fresh noise; no guidance",
        inferred="its causal attention in chunks of 3 frames is not that of stock transformers",
    ),
    PublishedRecipe(
        name="animatediff-lightning",
        family="animatediff",
        checkpoint="ByteDance/AnimateDiff-Lightning",
        scheduler={**_LINEAR, "_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"},
        steps=(1, 2, 4, 8),
        default_steps=4,
        size=(512, 512),
        stated="",
        inferred="Euler with trailing timesteps and linear betas, guidance 1, as remembered from its card; each step "
        "count has motion modules of its own: serve the one of yours",
    ),
    PublishedRecipe(
        name="animatelcm",
        family="animatediff",
        checkpoint="wangfuyun/AnimateLCM",
        scheduler={**_LINEAR, "_class_name": "LCMScheduler"},
        steps=tuple(range(1, 9)),
        default_steps=4,
        size=(512, 512),
        lora_scale=0.8,
        stated="",
        inferred="LCMScheduler with linear betas, 1 to 8 steps, LoRA at scale 0.8, as remembered from its card; its "
        "example has guidance 2, here there is none",
    ),
)
"""In the order of `tdm-recipe --list`."""
