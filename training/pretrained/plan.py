"""`tdm-train plan`: the memory of a preset at the size of its published model, without weights and without a GPU.

The denoiser's calls run on tensors without data (torch's FakeTensorMode), and every tensor that they make is counted.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tdm_runtime.families import Conditioning, Denoiser, denoiser_for, family_of_model
from tdm_runtime.families.architectures import REAL_SIZES, TEACHERS, RealSize, empty_model
from tdm_runtime.sampling.schedule import DiffusionSchedule
from training.config import ConfigError, DistillConfig
from training.methods.roles import CleanEstimator, Roles
from training.methods.trajectory import Coordinates
from training.pretrained.base_model import BaseModel
from training.pretrained.memory import StateMemory, state_memory
from training.pretrained.train import build_roles

GPU_BYTES = 80e9
"""Memory of the GPU that every preset fits."""
PUBLISHED: Mapping[str, RealSize] = {**{name: parts["denoiser"] for name, parts in REAL_SIZES.items()}, **TEACHERS}
"""Model -> its denoiser as it was published, for some with the input for K that students have."""
FOUR_LEVELS: Mapping[str, Any] = {"block_out_channels": (0, 0, 0, 0)}
"""What decides how far the VAEs of these models compress; the VAE of Wan has it in its class."""


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the tensors that were made within the block and are still alive, and their peak.

    Args:
        module: its weights and buffers are not counted.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        there = (*module.parameters(), *module.buffers())
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in there}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._sizes:
            return
        self._sizes[storage._cdata] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, storage._cdata)

    def _remove(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)

    def forget(self, tensor: Tensor) -> None:
        """Stop counting a tensor."""
        self._remove(tensor.untyped_storage()._cdata)


class _Item(TorchFunctionMode):
    """Answers `Tensor.item` where there is no data. The only numbers that a family asks for are lengths of prompts."""

    def __init__(self, answer: int) -> None:
        super().__init__()
        self._answer = answer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._answer if func is Tensor.item else func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Activations:
    """Bytes that the calls of one part of a batch add to the state."""

    graph: int
    """Held from a forward pass to its backward pass: activations, and copies of weights that autocast makes."""
    step: int
    """Peak of a forward and a backward pass, without the gradients of weights."""
    teacher: int
    """Peak of a call of the teacher under guidance, which needs no gradients."""

    def peak(self, parts: int) -> int:
        """Return the peak of an iteration. With one part the student's graph is kept while the fake score trains."""
        kept = self.graph if parts == 1 else 0
        return max(kept + self.step, self.graph + self.teacher)


@dataclass(frozen=True)
class Plan:
    """Memory of a distillation on each device."""

    model: RealSize
    config: DistillConfig
    samples: int
    """Samples of one part of the batch on one device."""
    parameters: int
    """Weights of the denoiser."""
    state: StateMemory
    activations: int
    """Peak of an iteration's activations in bytes, without the methods' own tensors of the size of latents."""

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return self.state.total + self.activations

    def __str__(self) -> str:
        config, state = self.config, self.state
        trained = state.average // 4
        kind = f"LoRA of rank {config.lora_rank}" if config.lora_rank else "all weights"
        again = "computed again in the backward pass" if config.gradient_checkpointing else "all kept"
        frames = f", {config.frames} frames" if config.frames > 1 else ""
        rows = [
            (f"frozen {'base' if config.lora_rank else 'teacher'}, {config.base_precision}", state.frozen),
            ("student and fake score", state.trained),
            ("their gradients", state.gradients),
            ("optimizer, AdamW's two moments", state.moments),
            ("average of the student", state.average),
            ("discriminator, all of the above", state.discriminator),
            (f"activations of {self.samples} samples, {again}", self.activations),
            (
                f"total, which {'fits' if self.total <= GPU_BYTES else 'is more than'} {GPU_BYTES / 1e9:g} GB",
                self.total,
            ),
        ]
        lines = [
            f"{self.model.model_class}, {config.width}x{config.height} pixels{frames}",
            f"parameters {self.parameters:,}, trained 2 x {trained:,} ({kind})",
            "GB on each GPU:",
            *(f"{size / 1e9:8.2f}  {name}" for name, size in rows if size),
        ]
        return "\n".join(lines)


def plan(config: DistillConfig, model: RealSize, processes: int = 1) -> Plan:
    """Return the memory of a distillation of a published model. It takes up to a minute.

    Raises:
        ConfigError: the batch cannot be cut into the parts of the processes.
    """
    parts = processes * config.accumulation
    if processes < 1 or config.batch_size % parts:
        raise ConfigError(
            f"batch_size {config.batch_size} cannot be cut into {processes} processes x {config.accumulation} "
            "accumulated parts; choose another number of processes"
        )
    with torch.device("meta"):
        denoiser = denoiser_for(empty_model(model).eval())
    denoiser.timestep_embedding.cond_proj = None  # the teacher's; a student that reads K gets one
    parameters = sum(weight.numel() for weight in denoiser.parameters())
    state = state_memory(config, denoiser, family_of_model(denoiser.model).lora_targets)
    samples = config.batch_size // parts
    activations = activations_of(config, denoiser, model.tokens, samples).peak(config.accumulation)
    return Plan(model, config, samples, parameters, state, activations)


def activations_of(config: DistillConfig, denoiser: Denoiser, tokens: int, samples: int) -> Activations:
    """Run the calls of one part without data, and count what they hold. The discriminator of a GAN is left out.

    Args:
        denoiser: on the meta device; it becomes part of the roles.
        tokens: of a prompt.
        samples: of one part.
    """
    family = family_of_model(denoiser.model)
    geometry = family.geometry(denoiser.model.config, FOUR_LEVELS)
    shape = geometry.latent_shape(config.width, config.height, config.frames)
    coordinates = Coordinates(DiffusionSchedule(), "epsilon")  # only losses read them
    base = BaseModel(family, denoiser, coordinates.schedule, coordinates.prediction_type, geometry)
    with torch.device("meta"):
        roles = build_roles(base, coordinates, config, torch.device("meta"))
    with FakeTensorMode(), _Item(tokens), torch.autocast("cpu", torch.bfloat16, config.precision == "bf16"):
        return _count(roles, _inputs_of(denoiser, shape, tokens), config, samples)


def _count(roles: Roles, inputs: Callable[[int], list[Any]], config: DistillConfig, samples: int) -> Activations:
    student, teacher = (_with_storage(role) for role in (roles.student, roles.teacher))
    roles.activate("student")
    with LiveBytes(student.denoiser) as live:
        for weight in student.denoiser.parameters():
            if weight.requires_grad:
                weight.register_post_accumulate_grad_hook(lambda weight: live.forget(weight.grad))  # type: ignore[no-untyped-call]
        latents, timesteps, *prompt = inputs(samples)
        counts = torch.ones(samples, dtype=torch.int64) if config.student_receives_k else None
        output = student.denoiser(latents, timesteps, counts, *prompt)
        graph = live.now
        output.sum().backward()
        step = live.peak
    del output, latents, prompt
    with LiveBytes(teacher.denoiser) as live, torch.no_grad():
        latents, timesteps, *prompt = inputs(samples * (1 if config.guidance_scale == 1 else 2))
        teacher.before()
        teacher.denoiser(latents, timesteps, None, *prompt)
    return Activations(graph, step, live.peak)


def _with_storage(role: CleanEstimator) -> CleanEstimator:
    """Replace a role's weights and buffers by tensors of the active FakeTensorMode, on the CPU."""
    for module in role.denoiser.modules():
        for name, weight in module._parameters.items():
            if weight is not None and weight.is_meta:
                made = torch.empty(weight.shape, dtype=weight.dtype)
                module._parameters[name] = nn.Parameter(made, weight.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    return role


def _inputs_of(denoiser: Denoiser, shape: Sequence[int], tokens: int) -> Callable[[int], list[Any]]:
    """Return the function from a number of samples to latents, timesteps and the fields of a `Conditioning`."""
    specs = denoiser.interface(tokens).inputs[3:]

    def inputs(samples: int) -> list[Any]:
        made = {one.name: torch.zeros([samples, *one.shape[1:]], dtype=getattr(torch, one.dtype)) for one in specs}  # type: ignore[list-item]
        return [torch.zeros(samples, *shape), torch.zeros(samples), *Conditioning(**made).tensors()]

    return inputs
