"""Presets of distillations by name, with the paper's hyper-parameters (App. D), and the baselines made from them.

Each docstring names the sources. "Paper" is TDM (App. D). "Demo" is its public demo and checkpoints. "Ours" are
choices that neither states: `ema_decay`, `accumulation` and checkpointing (both change memory and time, not the
result), and others marked so. In a preset for one K no model reads K: there is only one value, and stock pipelines
then need no input for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from training.config import DistillConfig

SD15 = DistillConfig(
    steps=20_000,
    batch_size=256,
    accumulation=8,
    step_counts=(1, 2, 3, 4),
    student_learning_rate=2e-6,
    fake_learning_rate=2e-5,
    guidance_scale=3.5,
    teacher_prediction="epsilon",
)
"""TDM-unify on Stable Diffusion 1.5, all weights, 512 pixels. Paper: every number."""

SD15_4STEP = replace(SD15, steps=3_000, step_counts=(4,), step_condition_for="none")
"""TDM for 4 steps on Stable Diffusion 1.5. Paper: "within 3k iterations for specific 4-step training"."""

SD15_LORA = replace(
    SD15_4STEP,
    batch_size=64,
    accumulation=2,
    lora_rank=64,
    lora_alpha=64.0,
    base_precision="bf16",
    student_learning_rate=1e-4,
    fake_learning_rate=4e-4,
)
"""TDM-LoRA (Table 2): 4 steps, for any model that was fine-tuned from the base.

Paper: iterations and guidance, as for 4 steps on Stable Diffusion 1.5. Demo: the rank, and a learning rate near
1e-4, since 2e-6 hardly moves a LoRA. Ours: the batch size, the fake score's learning rate, and alpha, which equals
the rank so that readers with and without alpha agree.
"""

SDXL_512 = DistillConfig(
    steps=1_000,
    batch_size=64,
    accumulation=8,
    step_counts=(4,),
    step_condition_for="none",
    teacher_prediction="epsilon",
    lora_rank=64,
    lora_alpha=64.0,
    base_precision="bf16",
    student_learning_rate=1e-4,
    fake_learning_rate=4e-4,
    guidance_scale=8.0,
    gradient_checkpointing=True,
    width=512,
    height=512,
)
"""First stage of 4 steps on SDXL, LoRA, 512 pixels.

Paper: iterations, batch size and guidance. It trains all weights, which takes 108 GB on one GPU before activations.
With that much memory set its other numbers: lora_rank 0, student_learning_rate 1e-6 and fake_learning_rate 5e-6. Ours:
LoRA and its rates, as in `SD15_LORA`.
"""

SDXL_1024 = replace(SDXL_512, accumulation=16, width=1024, height=1024)
"""Second stage, at 1024 pixels. The student starts from the first stage (`student_folder`), the fake score from
the pretrained SDXL again. Sources: as for the first stage, and the paper for the new fake score."""

PIXART_512 = DistillConfig(
    steps=500,
    batch_size=32,
    accumulation=2,
    step_counts=(4,),
    step_condition_for="none",
    student_learning_rate=2e-6,
    fake_learning_rate=2e-5,
    guidance_scale=3.5,
    teacher_prediction="epsilon",
)
"""4 steps on PixArt-alpha, all weights, 512 pixels. Paper: every number."""

PIXART_1024 = replace(PIXART_512, accumulation=8, gradient_checkpointing=True, width=1024, height=1024)
"""4 steps on PixArt-alpha at 1024 pixels. Paper: every number; it states them once for both sizes."""

SD3 = DistillConfig(
    steps=3_000,
    batch_size=32,
    accumulation=8,
    step_counts=(4,),
    step_condition_for="none",
    teacher_prediction="flow_prediction",
    guidance_scale=7.0,
    student_learning_rate=1e-4,
    fake_learning_rate=4e-4,
    lora_rank=32,
    lora_alpha=64.0,
    base_precision="bf16",
    gradient_checkpointing=True,
    width=1024,
    height=1024,
    flow_shift=6.0,
)
"""4 steps on Stable Diffusion 3, LoRA, flow matching. The paper has no numbers for it.

Demo: flow shift 6, 1024 pixels, two adapters on one base, and the rank and alpha of the SD3.5 checkpoint.
diffusers: the guidance, which is its pipeline's default. Ours: the rest.
"""

COGVIDEOX_2B = DistillConfig(
    steps=2_000,
    batch_size=8,
    accumulation=8,
    step_counts=(4,),
    timesteps={4: (999.0, 856.0, 665.0, 399.0)},
    step_condition_for="none",
    teacher_prediction="v_prediction",
    guidance_scale=6.0,
    student_learning_rate=1e-4,
    fake_learning_rate=4e-4,
    lora_rank=64,
    lora_alpha=64.0,
    base_precision="bf16",
    gradient_checkpointing=True,
    width=720,
    height=480,
    frames=49,
)
"""4 steps on CogVideoX-2b, LoRA, 49 frames. The paper has a result (Table 4) and no numbers.

Demo: the timesteps (even spacing makes worse video), size and frames, and a learning rate near 1e-4 for LoRA.
diffusers: the guidance, which is its pipeline's default. Ours: the rest.
"""

WAN_1_3B = replace(
    COGVIDEOX_2B,
    timesteps={},
    teacher_prediction="flow_prediction",
    guidance_scale=5.0,
    width=832,
    height=480,
    frames=81,
    flow_shift=3.0,
)
"""4 steps on Wan 2.1 1.3B, LoRA, flow matching, 81 frames of 832x480. The paper has no numbers for it.

diffusers: guidance, size, frames, and the shift for 480 lines. Ours: the rest, as for CogVideoX.
"""

Z_IMAGE = replace(SD3, accumulation=16, guidance_scale=6.0, flow_shift=0.0)
"""4 steps on Z-Image, LoRA, flow matching. The paper has no numbers for it.

Demo: the rank and alpha of TDM-R1's LoRA for Z-Image-Turbo; its timesteps 1000, 900, 750 and 500 are the default here
if the base has shift 3, as Turbo has. diffusers: the guidance; its pipeline's default of 5 counts
from 0 and ours from 1. Ours: the rest. Z-Image-Turbo was distilled without guidance: set guidance_scale to 1 for it.
"""

FLUX_DEV = replace(Z_IMAGE, guidance_scale=1.0)
"""4 steps on FLUX.1 [dev], LoRA, flow matching, shifted by the size. The paper has no numbers for it.

Teacher and student read the guidance that the embeddings hold, 3.5, so the teacher needs no second call: guidance_scale
is 1. Ours: everything, as for Z-Image.
"""

FLUX2_KLEIN_BASE_4B = replace(Z_IMAGE, guidance_scale=4.0)
"""4 steps on FLUX.2 [klein] Base 4B, LoRA, flow matching, shifted by size and step count. The paper has no numbers.

diffusers: the guidance, which is its pipeline's default. Ours: the rest, as for Z-Image.
"""

PRESETS: Mapping[str, DistillConfig] = {
    "sd15": SD15,
    "sd15-4step": SD15_4STEP,
    "sd15-lora": SD15_LORA,
    "sdxl-512": SDXL_512,
    "sdxl": SDXL_1024,
    "pixart-alpha": PIXART_512,
    "pixart-alpha-1024": PIXART_1024,
    "sd3-medium": SD3,
    "flux-dev": FLUX_DEV,
    "flux2-klein-base-4b": FLUX2_KLEIN_BASE_4B,
    "z-image": Z_IMAGE,
    "cogvideox-2b": COGVIDEOX_2B,
    "wan-1.3b": WAN_1_3B,
}
"""Name on the command line -> preset."""

PUBLISHED_BASES: Mapping[str, str] = {
    "sd15": "sd15",
    "sd15-4step": "sd15",
    "sd15-lora": "sd15",
    "sdxl-512": "sdxl",
    "sdxl": "sdxl",
    "pixart-alpha": "pixart",
    "pixart-alpha-1024": "pixart",
    "sd3-medium": "sd3",
    "flux-dev": "flux-dev",
    "flux2-klein-base-4b": "flux2-klein-base-4b",
    "z-image": "z-image",
    "cogvideox-2b": "cogvideox-2b",
    "wan-1.3b": "wan-1.3b",
}
"""Preset -> model whose published size `tdm-train plan` takes (`training.pretrained.plan.PUBLISHED`)."""


def as_dmd2(config: DistillConfig) -> DistillConfig:
    """Return the same run by DMD2 (Yin et al. 2024): one fake score, clean estimates matched over all noise levels.

    Sources: App. F.1 for the ten updates of the fake score, "other hyper-parameters remain consistent"; DMD2 for
    the rest. `adversarial_weight`, the weight of its discriminator, stays unchanged.
    """
    return replace(
        config,
        method="tdm",
        rollout="stochastic",
        matching="clean",
        interval="full",
        step_condition_for="none",
        fake_updates=10,
        generator_loss="normalised_l2",
        fake_target="clean",
    )


def as_lcm(config: DistillConfig) -> DistillConfig:
    """Return the same run by latent consistency distillation (Luo et al. 2023), on real latents."""
    return replace(config, method="lcm", interval="full", step_condition_for="none", adversarial_weight=0.0)


def as_tcd(config: DistillConfig) -> DistillConfig:
    """Return the same run by trajectory consistency distillation (Zheng et al. 2024), on real latents.

    The student is sampled with gamma 0, which is DDIM.
    """
    return replace(as_lcm(config), method="tcd")
