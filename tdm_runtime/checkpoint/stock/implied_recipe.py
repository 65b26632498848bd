"""The recipe that a stock diffusers folder implies, so that it opens without `tdm_recipe.json`.

It is read from scheduler/scheduler_config.json, model_index.json and the configs of denoiser and VAE, and says exactly
what the stock pipeline would sample with the same arguments. Where the files do not say for how many steps a
checkpoint was distilled, nothing is guessed: the error names the recipes that would fit.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tdm_runtime.checkpoint.frame_rule import FrameRule
from tdm_runtime.checkpoint.recipe import RECIPE_FILE, Recipe, load_recipe, parse_recipe
from tdm_runtime.checkpoint.size_rule import SizeRule, rule_around
from tdm_runtime.checkpoint.stock.pipeline_call import GUIDANCE_SCALES, PIPELINE_CALLS, ScheduleRequest
from tdm_runtime.checkpoint.stock.pipeline_folder import MODEL_INDEX, read_json
from tdm_runtime.checkpoint.stock.published_recipes import published_for
from tdm_runtime.checkpoint.stock.schedule import sampling_of
from tdm_runtime.checkpoint.stock.scheduler_config import SchedulerConfig
from tdm_runtime.errors import RecipeError, shown
from tdm_runtime.families import Family

logger = logging.getLogger(__name__)

SCHEDULER_FILE = "scheduler/scheduler_config.json"
Served = tuple[tuple[int, ...], int, str]
"""Step counts, the default one, and the reason."""


def recipe_of(folder: Path, family: Family) -> Recipe:
    """Return the recipe of a checkpoint folder: its `tdm_recipe.json`, or the recipe that its configs imply.

    Raises:
        RecipeError: the file cannot be followed, or there is none and the configs do not say enough.
    """
    if (folder / RECIPE_FILE).exists() or not (folder / SCHEDULER_FILE).exists():
        return load_recipe(folder)
    return implied_recipe(family, folder)


def implied_recipe(
    family: Family,
    folder: Path,
    steps: Sequence[int] | None = None,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
    guidance: float | None = None,
    *,
    eta: float = 0.0,
    name: str | None = None,
) -> Recipe:
    """Return the recipe that makes what the folder's stock pipeline makes with the same arguments.

    Args:
        steps: Step counts to serve, `num_inference_steps`; the largest is the default. None serves those that the
            files imply, or the length of the list given.
        timesteps: Argument `timesteps` of the pipeline.
        sigmas: Argument `sigmas` of the pipeline.
        guidance: Guidance scale that the denoiser reads; None is the pipeline's default. A denoiser that reads none
            runs without guidance.
        eta: Argument `eta` of the pipeline, which TCD reads.
        name: Name in requests; None is the folder's.

    Raises:
        RecipeError: naming the file, the setting or argument, and the remedy.
    """
    file = folder / SCHEDULER_FILE
    raw = read_json(file)
    scale = guidance_scale(family, folder, guidance)
    try:
        config = SchedulerConfig.of(raw)
        default: int | None = None
        counts = None if steps is None else tuple(steps)
        if steps is None and timesteps is None and sigmas is None:
            counts, default, reason = _served_steps(family, folder, config)
            logger.info("%s has no %s and implies one: %s, %s", folder, RECIPE_FILE, config.class_name, reason)
        request = ScheduleRequest.of(family.name, counts, _numbers(timesteps), _numbers(sigmas), eta)
        sampling = sampling_of(config, request)
        if not sampling.timesteps:
            raise RecipeError("steps is empty; give at least one step count")
        recipe = sampling.recipe(
            name or folder.resolve().name,
            default if default is not None else max(sampling.timesteps),
            (native_size(family, folder),),
            scale,
            native_clip(family, folder),
        )
        recipe = replace(recipe, size_rule=size_rule(family, folder))
        return parse_recipe(json.loads(recipe.to_json()))  # checks every field as a file's
    except RecipeError as error:
        raise RecipeError(f"{file}: {error}") from None


def size_rule(family: Family, folder: Path) -> SizeRule:
    """Return the rule of a folder whose native size is all that is known.

    Raises:
        RecipeError: a config does not describe the latents.
    """
    denoiser, vae = (read_json(folder / part / "config.json") for part in (family.denoiser_folder, "vae"))
    try:
        multiple = family.geometry(denoiser, vae).size_multiple
    except KeyError as error:
        file = folder / family.denoiser_folder / "config.json"
        raise RecipeError(f"{file} lacks {error.args[0]}; restore the folder from its source") from None
    return rule_around(*native_size(family, folder), multiple)


def native_clip(family: Family, folder: Path) -> tuple[FrameRule, int] | None:
    """Return the rule for the frames of a folder's clips, and fps; None for a model that makes pictures."""
    denoiser, vae = (read_json(folder / part / "config.json") for part in (family.denoiser_folder, "vae"))
    clip = family.native_clip(denoiser)
    if clip is None:
        return None
    step = family.geometry(denoiser, vae).frame_step

    def allowed(frames: int) -> int:
        return (frames - 1) // step * step + 1

    return FrameRule(allowed(clip.frames), step, allowed(clip.max_frames)), clip.fps


def native_size(family: Family, folder: Path) -> tuple[int, int]:
    """Return the (width, height) that the stock pipeline makes by default, in pixels."""
    size = PIPELINE_CALLS[family.name].size if family.name in PIPELINE_CALLS else None
    if size is not None:
        return size
    denoiser = read_json(folder / family.denoiser_folder / "config.json")
    compression = family.spatial_compression(read_json(folder / "vae" / "config.json"))
    sample_size: Any = denoiser.get("sample_size", 64)
    height: Any
    width: Any
    height, width = sample_size if isinstance(sample_size, list) else (sample_size, sample_size)
    height, width = denoiser.get("sample_height", height), denoiser.get("sample_width", width)
    if not all(type(side) is int and side > 0 for side in (width, height)):
        raise RecipeError(
            f"{folder / family.denoiser_folder / 'config.json'}: sample_size is {shown(sample_size)}; it must be a "
            "whole number of latents, restore the folder from its source"
        )
    return width * compression, height * compression


def _served_steps(family: Family, folder: Path, config: SchedulerConfig) -> Served:
    """Return the step counts of a checkpoint whose files tell that it was distilled.

    Raises:
        RecipeError: they do not tell.
    """
    few: tuple[int, ...] = (1, 2, 3, 4)
    if config.class_name in ("LCMScheduler", "TCDScheduler"):
        return tuple(range(1, 9)), 4, "a consistency model for 1 to 8 steps"
    if config.class_name == "SCMScheduler":
        return few, 2, "a consistency model for 1 to 4 steps"
    if read_json(folder / MODEL_INDEX).get("is_distilled") is True:
        return few, 4, "is_distilled in model_index.json, for 1 to 4 steps"
    if (
        family.name == "flux"
        and not config.settings.get("use_dynamic_shifting")
        and not _reads_guidance(family, folder)
    ):
        return few, 4, "a FLUX.1 without guidance and without shift is schnell, for 1 to 4 steps"
    fitting = [entry.name for entry in published_for(family.name)]
    names = f"one of {', '.join(fitting)}" if fitting else "none that is built in"
    raise RecipeError(
        f"{RECIPE_FILE} is missing, and a {config.class_name} does not say for how many steps the checkpoint was "
        "distilled; restore it from its source, or run "
        f"`tdm-recipe {folder} --steps ... -o {folder / RECIPE_FILE}` with the step counts of its card, or with "
        f"`--recipe NAME`, {names}"
    )


def _reads_guidance(family: Family, folder: Path) -> bool:
    config = read_json(folder / family.denoiser_folder / "config.json")
    return config.get("time_cond_proj_dim") is not None or bool(config.get("guidance_embeds"))


def guidance_scale(family: Family, folder: Path, guidance: float | None) -> float | None:
    """Return the guidance scale that a folder's denoiser reads; None if it reads none.

    Args:
        guidance: Wanted scale; None is the default of the stock pipeline.

    Raises:
        RecipeError: guidance is wanted of a denoiser that reads none.
    """
    if _reads_guidance(family, folder):
        if guidance is not None:
            return guidance
        if (name := read_json(folder / MODEL_INDEX).get("_class_name")) in GUIDANCE_SCALES:
            return GUIDANCE_SCALES[str(name)]
        return PIPELINE_CALLS[family.name].guidance_scale if family.name in PIPELINE_CALLS else None
    if guidance is not None and guidance > 1.0:
        raise RecipeError(
            f"guidance is {guidance:g}, but {folder / family.denoiser_folder / 'config.json'} is of a model that reads "
            "none; leave it out, few-step checkpoints run without classifier-free guidance"
        )
    return None


def _numbers(values: Sequence[float] | None) -> tuple[float, ...] | None:
    return None if values is None else tuple(float(value) for value in values)
