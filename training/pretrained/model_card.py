"""Model card of a trained student: where it comes from, how it is sampled, and how to serve it."""

from __future__ import annotations

from tdm_runtime.checkpoint.recipe import Recipe
from tdm_runtime.checkpoint.stock.pipeline_call import PIPELINE_CALLS
from tdm_runtime.families import Family
from tdm_runtime.sampling.schedule import FlowSchedule
from training.config import DistillConfig, config_as_toml

CARD_FILE = "README.md"
_METHODS = {
    "TDM": "Trajectory Distribution Matching (Luo et al. 2025)",
    "DMD2": "DMD2 (Yin et al. 2024)",
    "LCM": "latent consistency distillation (Luo et al. 2023)",
    "TCD": "trajectory consistency distillation (Zheng et al. 2024)",
}
_GUIDANCE_OFF = {"z_image": 0.0}
"""Family -> guidance_scale at which its stock pipeline calls the model once; 1 for the others."""


def model_card(config: DistillConfig, recipe: Recipe, family: Family, base: str) -> str:
    """Return the card as Markdown.

    Args:
        base: folder of the base, relative to that of the model.
    """
    counts = ", ".join(str(k) for k in sorted(config.step_counts))
    timesteps = "; ".join(f"K = {k}: {', '.join(f'{t:g}' for t in ts)}" for k, ts in sorted(recipe.timesteps.items()))
    weights = f"LoRA of rank {config.lora_rank}, which needs its base" if config.lora_rank else "whole"
    rows = [
        ("base", f"`{base}`, family {family.name}"),
        ("method", _METHODS["DMD2" if config.rollout == "stochastic" else config.method.upper()]),
        ("weights", weights),
        ("step counts K", f"{counts}{', which the model reads' if config.student_receives_k else ''}"),
        ("timesteps", timesteps),
        ("solver", f"{recipe.solver}, {recipe.prediction_type}"),
        ("size", f"{config.width}x{config.height} pixels" + (f", {config.frames} frames" if config.frames > 1 else "")),
        ("teacher's guidance", f"{config.guidance_scale:g}; the student runs without"),
        ("training", f"{config.steps} iterations of {config.batch_size} samples, seed {config.seed}"),
    ]
    return "\n".join(
        [
            f"# {recipe.name}",
            "",
            "A student of few deterministic steps." if not config.samples_with_noise else "A student of few steps.",
            "It was not evaluated by training; licence and limits are those of its base.",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in rows),
            "",
            "## Serving",
            "",
            "In this folder:",
            "",
            "```",
            f"tdm-serve --model {recipe.name}=.",
            f'tdm-generate --checkpoint . --steps {recipe.default_steps} --seed 7 "a red fox"',
            "```",
            "",
            _with_diffusers(config, recipe, family, base),
            "",
            "## Settings",
            "",
            "`tdm-train distill --config` reads them:",
            "",
            "```toml",
            config_as_toml(config).rstrip(),
            "```",
            "",
        ]
    )


def _with_diffusers(config: DistillConfig, recipe: Recipe, family: Family, base: str) -> str:
    """Return how a stock pipeline makes the same picture, or why none does."""
    schedule, call = recipe.noise_schedule, PIPELINE_CALLS[family.name]
    is_flow = isinstance(schedule, FlowSchedule)
    if config.student_receives_k:
        return "Stock pipelines of diffusers give the model no K, so their pictures are worse."
    if family.makes_clips or config.timesteps or recipe.solver not in ("ddim", "euler") or is_flow > call.takes_sigmas:
        return "No scheduler of diffusers takes these timesteps and this solver unchanged; the recipe has them."
    steps = recipe.default_steps
    scheduler, settings = "DDIMScheduler", 'timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True'
    if isinstance(schedule, FlowSchedule):
        scheduler = "FlowMatchEulerDiscreteScheduler"
        settings = f"shift={schedule.shift!r}, use_dynamic_shifting=False"
    guidance = recipe.guidance_scale or _GUIDANCE_OFF.get(family.name, 1.0)
    given = f"sigmas={[1 - n / steps for n in range(steps)]}" if is_flow else f"num_inference_steps={steps}"
    return "\n".join(
        [
            "Stock diffusers, with the same picture:",
            "",
            "```python",
            "import torch",
            f"from diffusers import DiffusionPipeline, {scheduler}",
            "",
            f'pipeline = DiffusionPipeline.from_pretrained("{base if config.lora_rank else "."}")',
            *(['pipeline.load_lora_weights(".")'] if config.lora_rank else []),
            f"pipeline.scheduler = {scheduler}.from_config(pipeline.scheduler.config, {settings})",
            "picture = pipeline(",
            f'    prompt="a red fox", {given}, guidance_scale={guidance},',
            f"    width={config.width}, height={config.height},",
            "    generator=torch.Generator().manual_seed(7),",
            ").images[0]",
            "```",
        ]
    )
