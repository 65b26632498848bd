"""The model folder that a distillation ends in; `tdm-generate` and `tdm-serve` open it as it is.

A LoRA's folder is small: its recipe names the base, which must stay where it is in relation to this folder.

    tdm_recipe.json                      `base`, `adapters`, and how to sample the student
    README.md                            model card
    pytorch_lora_weights.safetensors     (step_condition.safetensors)

A folder of whole weights is a pipeline folder: the base's parts, linked or copied, and the student's denoiser.

    tdm_recipe.json, model_index.json, README.md
    unet|transformer/                    (step_condition.safetensors beside it)
    vae/, text_encoder/, tokenizer/, scheduler/, ...
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tdm_runtime.checkpoint.file_hashes import file_sha256
from tdm_runtime.checkpoint.folder import weight_hashes
from tdm_runtime.checkpoint.folder_files import PICKLE_SUFFIXES, TINY_VAE
from tdm_runtime.checkpoint.recipe import RECIPE_FILE, Adapter, Recipe
from tdm_runtime.checkpoint.size_rule import SizeRule, rule_around
from tdm_runtime.checkpoint.stock.implied_recipe import native_clip
from tdm_runtime.checkpoint.stock.pipeline_folder import MODEL_INDEX, read_json
from tdm_runtime.families import Denoiser, family_of_model
from tdm_runtime.sampling.solvers import Solver
from tdm_runtime.whole_file import link_or_copy
from training.config import DistillConfig
from training.methods.trajectory import Coordinates
from training.pretrained.model_card import CARD_FILE, model_card
from training.pretrained.student_files import LORA_FILE, denoiser_of, part_name, save_student
from training.run.distill import Distiller, timesteps_of


def save_model(distiller: Distiller, base_folder: Path, folder: Path, name: str) -> None:
    """Write the averaged student with its recipe in place of what `folder` held.

    Args:
        base_folder: pipeline folder that the student was distilled from.
        name: name of the model in requests.
    """
    config, denoiser = distiller.config, denoiser_of(distiller)
    recipe = recipe_of(config, distiller.run.coordinates, name)
    guidance = distiller.run.prompts.empty().guidance
    recipe = replace(
        recipe,
        size_rule=_size_rule(denoiser, base_folder, config),
        guidance_scale=None if guidance is None else float(guidance[0]),
        **_clip(denoiser, base_folder, config),
    )
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    base = os.path.relpath(base_folder.resolve(), folder.resolve())
    if config.lora_rank:
        recipe = replace(recipe, base=base, adapters=(Adapter(LORA_FILE),))
    else:
        link_pipeline(base_folder, partial, without=part_name(denoiser))
    save_student(distiller, partial)
    if config.lora_rank:
        files = {file.name: file_sha256(file) for file in sorted(partial.glob("*.safetensors"))}
    else:
        files = weight_hashes(partial)
    recipe = replace(recipe, files=files)
    (partial / RECIPE_FILE).write_text(recipe.to_json(), encoding="utf-8")
    card = model_card(config, recipe, family_of_model(denoiser.model), base)
    (partial / CARD_FILE).write_text(card, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def recipe_of(config: DistillConfig, coordinates: Coordinates, name: str) -> Recipe:
    """Return the recipe for what a config trains, as far as the config says it."""
    return Recipe(
        name=name,
        prediction_type=coordinates.prediction_type,
        noise_schedule=coordinates.schedule,
        solver=_solver(config),
        timesteps={k: timesteps_of(config, coordinates, k) for k in config.step_counts},
        default_steps=max(config.step_counts),
        native_sizes=((config.width, config.height),),
        step_condition="timestep_cond" if config.student_receives_k else "none",
    )


def link_pipeline(base_folder: Path, folder: Path, without: str) -> None:
    """Make a pipeline folder of the base's parts but one, linked or copied. Pickled weights are left out."""
    index: Mapping[str, Any] = read_json(base_folder / MODEL_INDEX)
    parts = {name for name in (*index, TINY_VAE) if (base_folder / name).is_dir()} - {without}
    pickles = shutil.ignore_patterns(*(f"*{suffix}" for suffix in PICKLE_SUFFIXES))
    for part in sorted(parts):
        shutil.copytree(base_folder / part, folder / part, ignore=pickles, copy_function=_take_over, dirs_exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    _take_over(str(base_folder / MODEL_INDEX), str(folder / MODEL_INDEX))


def _solver(config: DistillConfig) -> Solver:
    """Return the solver that a student is sampled with."""
    if config.method == "lcm":
        return "lcm"
    return "renoise" if config.samples_with_noise else config.solver


def _size_rule(denoiser: Denoiser, base_folder: Path, config: DistillConfig) -> SizeRule:
    vae = read_json(base_folder / "vae" / "config.json")
    geometry = family_of_model(denoiser.model).geometry(denoiser.model.config, vae)
    return rule_around(config.width, config.height, geometry.size_multiple)


def _clip(denoiser: Denoiser, base_folder: Path, config: DistillConfig) -> dict[str, Any]:
    """Return the fields of the recipe of a model that makes clips; none for pictures."""
    if (clip := native_clip(family_of_model(denoiser.model), base_folder)) is None:
        return {}
    rule, fps = clip
    return {"frames": replace(rule, default=rule.nearest(config.frames)), "fps": fps}


def _take_over(source: str, target: str) -> None:
    """Link weights, which are gigabytes, if the file system can; copy everything else."""
    Path(target).unlink(missing_ok=True)
    if source.endswith(".safetensors"):
        link_or_copy(Path(source), Path(target))
    else:
        shutil.copy2(source, target)
