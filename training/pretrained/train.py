"""Distil or fine-tune a pretrained backbone: from a diffusers folder and embedded prompts to a student.

All families are trained by the same code; what differs between them is in `tdm_runtime.families`.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import torch

from tdm_runtime.families import Denoiser
from tdm_runtime.model.decoder import torch_decoder
from tdm_runtime.sampling.schedule import FlowSchedule
from tdm_runtime.whole_file import write_whole
from training.config import ConfigError, DistillConfig, check_resume, config_as_toml, load_config
from training.methods.roles import CleanEstimator, LoraRoles, Roles, SeparateRoles
from training.methods.trajectory import Coordinates
from training.pretrained.base_model import BaseModel, load_base_model
from training.pretrained.latents import load_latent_encoder
from training.pretrained.model_folder import link_pipeline, save_model
from training.pretrained.prompts import EmbeddedPrompts
from training.pretrained.student_files import (
    load_adapter,
    load_student,
    part_name,
    require_step_condition,
    save_denoiser,
)
from training.run.distill import Distiller, Run, distill
from training.run.finetune import FinetuneConfig, finetune
from training.run.loop import STATE_FILE
from training.run.plot import SampleGrid, plot_log
from training.run.processes import Processes

CONFIG_FILE = "config.toml"
STEPS_OF_TEACHERS = (50,)
"""Step count whose shift a fine-tuned teacher is trained with, where a shift depends on it (FLUX.2)."""
MODEL_FOLDER = "model"
"""Folder of the student in the folder of its run, which also has the training state."""
GRID_PROMPTS = 4
"""Prompts in a sample grid."""


def train_backbone(
    folder: Path,
    base_folder: Path,
    embeddings_folder: Path,
    config: DistillConfig,
    *,
    student_folder: Path | None = None,
    name: str | None = None,
) -> Path:
    """Distil or resume in `folder`.

    Args:
        base_folder: a diffusers pipeline folder; text encoders are not loaded.
        embeddings_folder: folder that `training.pretrained.prompts.embed_prompts` wrote.
        student_folder: see `build_backbone_distiller`.
        name: name of the model in its recipe; by default the folder's.

    Returns:
        `folder / "model"`, the averaged student as a model to serve (`training.pretrained.model_folder`).

    Raises:
        TDMError: base, embeddings, config and student do not fit together; the message names what does not fit.
        TrainingDivergedError: the loss or a weight is not finite; the state in `folder` is from before that.
    """
    if (folder / STATE_FILE).is_file() and (folder / CONFIG_FILE).is_file():
        check_resume(load_config(DistillConfig(), folder / CONFIG_FILE), config, folder)
    distiller = build_backbone_distiller(base_folder, embeddings_folder, config, student_folder)
    if distiller.processes.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / CONFIG_FILE, config_as_toml(config).encode())
    grid = sample_grid(folder, base_folder, distiller) if config.grid_every else None
    distill(folder, distiller, None if grid is None else grid.draw)
    if distiller.processes.is_main:
        save_model(distiller, base_folder, folder / MODEL_FOLDER, name or folder.resolve().name)
        plot_log(folder)
    distiller.processes.wait()
    return folder / MODEL_FOLDER


def sample_grid(folder: Path, base_folder: Path, distiller: Distiller) -> SampleGrid:
    """Return a grid that draws samples of the first prompts into `folder/samples`, decoded by the base's VAE."""
    encoder = load_latent_encoder(base_folder, str(distiller.device))
    decoder = torch_decoder(encoder.vae, distiller.device, family=encoder.family)
    conditioning = distiller.run.prompts.conditioning(range(GRID_PROMPTS)).to(distiller.device)
    return SampleGrid(folder / "samples", distiller, conditioning, decoder.decode)


def build_backbone_distiller(
    base_folder: Path,
    embeddings_folder: Path,
    config: DistillConfig,
    student_folder: Path | None = None,
    processes: Processes | None = None,
) -> Distiller:
    """Return the distillation of a pretrained backbone, before its first iteration.

    Args:
        student_folder: folder that the student starts from instead of the base: model/ of SDXL's first stage, or an
            LCM (Fig. 8). The fake score always starts from the base (App. D).

    Raises:
        TDMError: base, embeddings, config and student do not fit together; the message names what does not fit.
        ValueError: the model has no latents of the config's size.
    """
    processes = processes or Processes()
    base, prompts = load_base_model(base_folder), EmbeddedPrompts(embeddings_folder, config.seed)
    prompts.require(base, config.width, config.height)
    shape = base.geometry.latent_shape(config.width, config.height, config.frames)
    coordinates = coordinates_of(base, config)
    roles = build_roles(base, coordinates, config, processes.device, student_folder)
    return Distiller(Run(roles, coordinates, prompts, shape, config), processes)


def coordinates_of(base: BaseModel, config: DistillConfig) -> Coordinates:
    """Return the base's noise schedule and prediction type at the config's size; a flow_shift replaces a flow's shift.

    Raises:
        ConfigError: the config wants another prediction type, a flow's shift for a diffusion model, or LCM or TCD for
            a flow.
    """
    if config.teacher_prediction not in ("any", base.prediction_type):
        raise ConfigError(
            f"teacher_prediction is {config.teacher_prediction} and the base, a {base.family.name}, has "
            f"{base.prediction_type}; use the base of the preset, or set teacher_prediction in --config to the base's"
        )
    coordinates = base.coordinates_at(config.width, config.height, config.step_counts)
    schedule = coordinates.schedule
    is_flow = isinstance(schedule, FlowSchedule)
    if config.flow_shift and not is_flow:
        raise ConfigError(
            f"flow_shift is {config.flow_shift:g} and the base is {base.family.name}, a diffusion model; "
            "set flow_shift to 0"
        )
    if config.method != "tdm" and is_flow:
        raise ConfigError(
            f"method '{config.method}' knows diffusion schedules, {base.family.name} is a flow; set method to tdm"
        )
    if isinstance(schedule, FlowSchedule) and config.flow_shift:
        return Coordinates(replace(schedule, shift=config.flow_shift), base.prediction_type)
    return coordinates


def build_roles(
    base: BaseModel,
    coordinates: Coordinates,
    config: DistillConfig,
    device: torch.device,
    student_folder: Path | None = None,
) -> Roles:
    """Return teacher, student and fake score on a device, sharing one model if they are LoRAs.

    The denoiser of `base` becomes part of them.

    Raises:
        TDMError: the student's folder does not fit.
    """
    torch.manual_seed(config.seed)  # adapters start at random, the same on every process
    denoiser, student = base.denoiser, None
    if student_folder is not None and not config.lora_rank:
        student = load_student(copy.deepcopy(denoiser), student_folder)
        require_step_condition(student, config, f"the student in {student_folder}")
        student = student.to(device)
    require_step_condition(denoiser, config, "the base model")
    if not config.lora_rank:
        denoiser = denoiser.to(device)
        roles = SeparateRoles(denoiser, coordinates, student=student, precision=config.precision)
        if config.gradient_checkpointing:
            for role in ("student", "fake"):
                roles.module(role).model.enable_gradient_checkpointing()  # type: ignore[operator, union-attr]
        return roles
    targets = base.family.lora_targets
    shared = LoraRoles(
        denoiser,
        coordinates,
        config.lora_rank,
        config.adapter_alpha,
        targets,
        precision=config.precision,
        base_precision=config.base_precision,
    )
    denoiser.to(device)  # only now, as a base in bf16 is half as large
    if student_folder is not None:
        load_adapter(shared, student_folder, config)
    if config.gradient_checkpointing:
        denoiser.model.enable_gradient_checkpointing()
    return shared


def finetune_backbone(folder: Path, base_folder: Path, embeddings_folder: Path, config: FinetuneConfig) -> Path:
    """Fine-tune a base on real latents, the first stage of TDM-unify-SFT.

    Returns:
        `folder / "base"`, a pipeline folder to distil: a copy of the base's with the fine-tuned denoiser.

    Raises:
        TDMError: base and embeddings do not fit together, or there are no latents.
    """
    processes = Processes()
    base, prompts = load_base_model(base_folder), EmbeddedPrompts(embeddings_folder, config.seed)
    prompts.require(base, prompts.index.width, prompts.index.height)
    coordinates = base.coordinates_at(prompts.index.width, prompts.index.height, STEPS_OF_TEACHERS)
    if config.gradient_checkpointing:
        base.denoiser.model.enable_gradient_checkpointing()
    denoiser = base.denoiser.to(processes.device)
    average = finetune(folder, CleanEstimator(denoiser, coordinates, config.precision), prompts, config, processes)
    assert isinstance(average, Denoiser)
    result = folder / "base"
    if processes.is_main:
        link_pipeline(base_folder, result, without=part_name(denoiser))
        save_denoiser(average, result)
    processes.wait()
    return result
