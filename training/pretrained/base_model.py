"""Load the pretrained model that a student starts from out of a diffusers pipeline folder.

The denoiser and the noise schedule of its scheduler are loaded here. Prompts are encoded once, beforehand,
by the pipeline itself, so text encoders and denoiser are never in memory together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch

from tdm_runtime.checkpoint.stock.flow_schedule import size_shift_of
from tdm_runtime.checkpoint.stock.pipeline_call import PIPELINE_CALLS
from tdm_runtime.checkpoint.stock.pipeline_folder import check_loaded, family_of, load_text_encoders, read_json
from tdm_runtime.errors import CheckpointError, RecipeError
from tdm_runtime.families import Conditioning, Denoiser, Family, denoiser_for
from tdm_runtime.families.latent_space import LatentGeometry
from tdm_runtime.sampling.schedule import DiffusionSchedule, FlowSchedule, TeacherSchedule
from tdm_runtime.sampling.size_shift import SizeShift
from tdm_runtime.sampling.step_table import PREDICTION_TYPES, PredictionType
from training.methods.trajectory import Coordinates


@dataclass(frozen=True)
class BaseModel:
    """A pretrained denoiser and the noise that it was trained with. The teacher is made of it."""

    family: Family
    denoiser: Denoiser
    """Denoiser in float32, in eval mode, on the CPU."""
    noise_schedule: TeacherSchedule
    prediction_type: PredictionType
    geometry: LatentGeometry
    """Rule for the shape of the latents."""
    size_shift: SizeShift | None = None
    """Rule that shifts the noise schedule, a flow with shift 1, by the size of the picture; None for most."""

    def coordinates_at(self, width: int, height: int, step_counts: Sequence[int]) -> Coordinates:
        """Return noise schedule and prediction type at a size in pixels.

        FLUX.2's shift also depends on the step count: its noise schedule takes that of the most steps.
        """
        rule, schedule = self.size_shift, self.noise_schedule
        if rule is None or not isinstance(schedule, FlowSchedule):
            return Coordinates(schedule, self.prediction_type)
        shifts = {k: rule.shift_at(rule.mu_of(k, width, height)) for k in step_counts}
        return Coordinates(replace(schedule, shift=shifts[max(step_counts)]), self.prediction_type, shifts)


def load_base_model(folder: Path) -> BaseModel:
    """Load the denoiser of a diffusers pipeline folder and read its scheduler and VAE configs.

    Raises:
        CheckpointError: the folder is missing, damaged or of an unknown pipeline.
        RecipeError: its scheduler has a setting that training cannot follow.
    """
    family = family_of(folder)
    noise_schedule, prediction_type, size_shift = _read_noise_schedule(folder / "scheduler", family)
    vae = read_json(folder / "vae" / "config.json")
    try:
        family.spatial_compression(vae)
    except CheckpointError as error:  # before gigabytes are read
        raise CheckpointError(f"{folder}: {error}") from None
    denoiser = denoiser_for(load_denoiser_model(folder / family.denoiser_folder, family.denoiser_class))
    geometry = family.geometry(denoiser.model.config, vae)
    channels = family.latent_channels(vae)
    if channels not in (None, geometry.channels):
        raise CheckpointError(
            f"{folder}: the vae has {channels} latent channels and the {family.denoiser_folder} "
            f"{geometry.channels}; they are not of one model, restore the folder from its source"
        )
    return BaseModel(family, denoiser, noise_schedule, prediction_type, geometry, size_shift)


def load_denoiser_model(folder: Path, class_name: str) -> Any:
    """Load a diffusers denoiser with all its weights, float32, eval mode.

    Raises:
        CheckpointError: it cannot be loaded, or weights are missing or unused.
    """
    load = partial(getattr(diffusers, class_name).from_pretrained, use_safetensors=True, local_files_only=True)
    try:
        model, report = load(folder, output_loading_info=True)
    except Exception as error:  # diffusers raises many kinds; a user can do the same about all of them
        raise CheckpointError(
            f"{folder} cannot be loaded: {error}; it needs config.json and diffusion_pytorch_model.safetensors"
        ) from error
    check_loaded(folder, report)
    return model.float().eval()


def _read_noise_schedule(folder: Path, family: Family) -> tuple[TeacherSchedule, PredictionType, SizeShift | None]:
    """Build our schedule from a diffusers scheduler. Its class fills in defaults that its config leaves out."""
    file = folder / "scheduler_config.json"
    name = str(read_json(file).get("_class_name"))
    scheduler_class = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    if scheduler_class is None:
        raise RecipeError(f"{file} names the class {name}, which is no scheduler of diffusers; correct _class_name")
    try:
        scheduler = scheduler_class.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # diffusers raises many kinds; a user can do the same about all of them
        raise RecipeError(f"{file} is refused by {name} ({error}); correct it or use another base model") from error
    config = scheduler.config
    for setting in ("trained_betas", "shift_terminal", "invert_sigmas"):
        if config.get(setting):
            raise RecipeError(
                f"{file}: {setting} is {config[setting]!r}, which training cannot follow; remove it, "
                "if the model was trained without it, or use another base model"
            )
    try:
        return _flow_schedule(scheduler, family) or (*_diffusion_schedule(scheduler), None)
    except RecipeError as error:
        raise RecipeError(f"{file}: {error}; use a base model with a schedule that training knows") from None


def _flow_schedule(scheduler: Any, family: Family) -> tuple[FlowSchedule, PredictionType, SizeShift | None] | None:
    config, size_shift = scheduler.config, None
    is_dynamic, is_euler = config.get("use_dynamic_shifting"), type(scheduler).__name__.startswith("FlowMatch")
    if is_dynamic and not is_euler:
        raise RecipeError("use_dynamic_shifting is true, which training follows for FlowMatchEulerDiscreteScheduler")
    if is_dynamic:
        size_shift, shift = size_shift_of(config, PIPELINE_CALLS[family.name]), 1.0
    elif is_euler:
        shift = config.shift
    elif config.get("use_flow_sigmas"):
        shift = config.flow_shift
    else:
        return None
    schedule = FlowSchedule(shift=shift, num_train_timesteps=config.num_train_timesteps)
    return schedule, "flow_prediction", size_shift


def _diffusion_schedule(scheduler: Any) -> tuple[DiffusionSchedule, PredictionType]:
    config = scheduler.config
    if "beta_schedule" not in config or not hasattr(scheduler, "alphas_cumprod"):
        raise RecipeError(f"{type(scheduler).__name__} has no betas and no flow")
    prediction_type = config.get("prediction_type", "epsilon")
    if prediction_type not in PREDICTION_TYPES or prediction_type == "flow_prediction":
        raise RecipeError(f"prediction_type is {prediction_type!r}; it must be epsilon, v_prediction or sample")
    is_rescaled = bool(config.get("rescale_betas_zero_snr", False))
    schedule = DiffusionSchedule(
        beta_schedule=config.beta_schedule,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        num_train_timesteps=config.num_train_timesteps,
        rescale_zero_terminal_snr=is_rescaled,
        # Some schedulers keep a trace of signal at the last timestep after the rescale; ours keeps the same.
        min_alpha_cumprod=float(scheduler.alphas_cumprod[-1]) if is_rescaled else 0.0,
        snr_shift_scale=config.get("snr_shift_scale", 1.0),
    )
    return schedule, prediction_type


def encode_prompts(
    folder: Path, prompts: Sequence[str], *, batch_size: int, width: int, height: int, device: str = "cpu"
) -> Iterator[Conditioning]:
    """Encode prompts as the pipeline of the folder encodes them, without guidance; "" is the negative prompt.

    Args:
        batch_size: prompts in one call of the text encoders.
        width, height: size of the pictures in pixels, which SDXL reads.

    Yields:
        A `Conditioning` of at most `batch_size` prompts, in order, on `device`, float32.

    Raises:
        CheckpointError: the folder cannot be read, or a text encoder is missing; raised before the first batch.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    family = family_of(folder)
    encoders = load_text_encoders(folder, family, width, height, device)

    def batches() -> Iterator[Conditioning]:
        for start in range(0, len(prompts), batch_size):
            with torch.no_grad():  # not inference_mode: its tensors could not enter a loss later
                encoded = family.encode_prompts(list(prompts[start : start + batch_size]), encoders)
            yield encoded

    return batches()
