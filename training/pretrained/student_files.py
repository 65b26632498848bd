"""Weights of a trained student: whole or a LoRA. `training.pretrained.model_folder` makes a model of them.

unet|transformer/                    whole weights, as diffusers saves them, or
pytorch_lora_weights.safetensors     a LoRA with diffusers' names and alpha / rank folded into B, so that readers
                                     without alpha apply it right
step_condition.safetensors           the weights that read K, if the files above cannot hold them
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tdm_runtime.checkpoint.lora.lora_file import FOLDER_FILES, STEP_CONDITION_FILE, read_lora
from tdm_runtime.checkpoint.lora.merged_lora import merge_loras
from tdm_runtime.errors import CheckpointError
from tdm_runtime.families import Denoiser, denoiser_for, family_of_model
from training.config import ConfigError, DistillConfig
from training.methods.roles import CleanEstimator, LoraRoles
from training.pretrained.base_model import load_denoiser_model
from training.run.distill import Distiller

LORA_FILE = FOLDER_FILES[0]
ONE_FILE = "1TB"
"""Shard size that no model reaches: the runtime reads one weight file per model."""


def part_name(denoiser: Denoiser) -> str:
    """Return the folder of a denoiser in its pipeline, which is also the prefix of its LoRA."""
    return family_of_model(denoiser.model).denoiser_folder


# ---- saving --------------------------------------------------------------------------------------


def save_student(distiller: Distiller, folder: Path) -> list[Path]:
    """Write the weights of the averaged student. Returns the files that were written."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(distiller.roles, LoraRoles):
        return _save_lora(distiller.average, folder, part_name(denoiser_of(distiller)), distiller.config)
    assert isinstance(distiller.average, Denoiser)
    return save_denoiser(distiller.average, folder)


def save_denoiser(denoiser: Denoiser, folder: Path) -> list[Path]:
    """Write whole weights that diffusers' own `from_pretrained` reads. Returns the files that were written."""
    part = folder / part_name(denoiser)
    if denoiser.saves_step_condition:
        denoiser.model.save_pretrained(part, max_shard_size=ONE_FILE)
        return sorted(part.glob("*.safetensors"))
    with _without_step_condition(denoiser):
        denoiser.model.save_pretrained(part, max_shard_size=ONE_FILE)
    return sorted(part.glob("*.safetensors")) + _save_step_condition(denoiser.step_condition_state(), folder)


def denoiser_of(distiller: Distiller) -> Denoiser:
    """Return the student's denoiser, with the weights of the latest iteration."""
    student = distiller.roles.student
    assert isinstance(student, CleanEstimator) and isinstance(student.denoiser, Denoiser), "not a backbone"
    return student.denoiser


@contextmanager
def _without_step_condition(denoiser: Denoiser) -> Iterator[None]:
    projection = denoiser.timestep_embedding.cond_proj
    denoiser.timestep_embedding.cond_proj = None
    try:
        yield
    finally:
        denoiser.timestep_embedding.cond_proj = projection


def _save_lora(adapter: nn.Module, folder: Path, part: str, config: DistillConfig) -> list[Path]:
    named = {_model_name(name): p.detach().cpu() for name, p in adapter.named_parameters()}
    scale = config.adapter_alpha / config.lora_rank
    weights = {
        f"{part}.{name}": (p * scale if ".lora_B." in name else p).contiguous()
        for name, p in named.items()
        if ".lora_" in name
    }
    save_file(weights, folder / LORA_FILE, metadata={"format": "pt"})
    condition = {name: p for name, p in named.items() if ".lora_" not in name} if config.student_receives_k else {}
    return [folder / LORA_FILE, *_save_step_condition(condition, folder)]


def _model_name(name: str) -> str:
    """Return the name in the diffusers model, without the role, of a parameter in a role's ParameterDict."""
    dotted = name.replace("/", ".").removeprefix("model.")
    return dotted.replace(".roles.student.", ".").replace(".student.", ".")


def _save_step_condition(state: Mapping[str, Tensor], folder: Path) -> list[Path]:
    file = folder / STEP_CONDITION_FILE
    if not state:
        file.unlink(missing_ok=True)
        return []
    save_file(dict(state), file, metadata={"format": "pt"})
    return [file]


# ---- loading -------------------------------------------------------------------------------------


def load_student(base: Denoiser, folder: Path) -> Denoiser:
    """Load the student of a folder. A LoRA is merged into `base`, which is changed and returned.

    Args:
        folder: folder that `save_student` or `save_model` wrote, or any folder with unet|transformer, such as an LCM's.

    Raises:
        CheckpointError: the folder holds no student of this base.
    """
    family = family_of_model(base.model)
    if (folder / LORA_FILE).is_file():
        merge_loras({family.denoiser_folder: base}, [(read_lora(folder, family), 1.0)])
        return base
    part = folder / family.denoiser_folder
    if not part.is_dir():
        raise CheckpointError(
            f"{folder} has neither {part.name}/ nor {LORA_FILE}; give model/ of a run that distilled this base"
        )
    student = denoiser_for(load_denoiser_model(part, type(base.model).__name__))
    _require_same_shapes(base, student, part)
    if (folder / STEP_CONDITION_FILE).is_file():
        student.load_step_condition(read_tensors(folder / STEP_CONDITION_FILE))
    return student


def load_adapter(roles: LoraRoles, folder: Path, config: DistillConfig) -> None:
    """Start the student's adapter from a saved LoRA of the same rank.

    Raises:
        CheckpointError: the folder has no LoRA, or its LoRA has other layers or another rank.
    """
    file = folder / LORA_FILE
    if not file.is_file():
        raise CheckpointError(
            f"{folder} has no {LORA_FILE}; a LoRA goes on from a LoRA: set lora_rank to 0, or remove student_folder"
        )
    state, part = read_tensors(file), part_name(roles.base)
    if (folder / STEP_CONDITION_FILE).is_file():
        condition = read_tensors(folder / STEP_CONDITION_FILE)
        state |= {f"{part}.{name}": tensor for name, tensor in condition.items()}
    own = {f"{part}.{_model_name(name)}": p for name, p in roles.module("student").named_parameters()}
    needed = {name for name in own if ".lora_" in name} | set(state)
    differing = sorted(n for n in needed if n not in own or n not in state or own[n].shape != state[n].shape)
    if differing:
        raise CheckpointError(
            f"{folder} does not fit the student's adapter of rank {config.lora_rank}: {len(differing)} tensors differ "
            f"({differing[0]}, ...); set lora_rank and step_condition_for as they were there"
        )
    scale = config.adapter_alpha / config.lora_rank
    with torch.no_grad():
        for name, tensor in state.items():
            own[name].copy_(tensor / scale if ".lora_B." in name else tensor)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); restore it from its source") from None


def require_step_condition(denoiser: Denoiser, config: DistillConfig, what: str) -> None:
    """Give a denoiser an input for K if the config gives K to the student; otherwise refuse a model with that input.

    Args:
        what: name of the denoiser in the error.

    Raises:
        ConfigError: the model reads K, or a guidance scale, and the config does not give K to the student.
    """
    if config.student_receives_k:
        denoiser.add_step_condition()
    elif denoiser.condition_dim is not None:
        raise ConfigError(
            f"{what} has an input for K and step_condition_for is {config.step_condition_for!r} (method "
            f"{config.method}); set step_condition_for to both, or use a model without that input"
        )


def _require_same_shapes(base: Denoiser, student: Denoiser, folder: Path) -> None:
    ours, theirs = ({n: p.shape for n, p in d.named_parameters() if "cond_proj" not in n} for d in (base, student))
    if differing := sorted(n for n in {*ours, *theirs} if ours.get(n) != theirs.get(n)):
        raise CheckpointError(
            f"{folder} is no model like the base: {len(differing)} weights differ in shape ({differing[0]}, ...); "
            "give a student of this base"
        )
