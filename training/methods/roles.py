"""Teacher, student and fake score: three copies of a model, or one model with two LoRA adapters."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from tdm_runtime.families.conditioning import Conditioning
from tdm_runtime.families.denoiser import Denoiser
from tdm_runtime.families.family import ATTENTION_PROJECTIONS
from training.methods.losses import guided
from training.methods.precision import Precision, autocast
from training.methods.trajectory import Coordinates

TrainedRole = Literal["student", "fake"]


@dataclass(frozen=True)
class CleanEstimator:
    """Estimate of x_0 by a denoiser: (x, timesteps, conditioning, K) -> x_0."""

    denoiser: nn.Module
    coordinates: Coordinates
    precision: Precision = "bf16"
    before: Callable[[], None] = lambda: None
    """Function that runs before each call. It chooses the adapter if roles share a model."""
    needs_autocast: bool = False
    """Whether the denoiser holds weights in bf16 and so runs in autocast on every device."""

    def __call__(self, x: Tensor, timesteps: Tensor, conditioning: Conditioning, step_counts: Tensor | None) -> Tensor:
        """Return estimates of x_0, float32, shaped as x. With `step_counts` None the denoiser receives no K."""
        self.before()
        counts = None if step_counts is None else step_counts.to(x.device)
        with autocast(x.device, self.precision, always=self.needs_autocast):
            output = self.denoiser(x, timesteps.to(x.device, torch.float32), counts, *conditioning.tensors())
        return self.coordinates.to_clean(x, output, timesteps)


@dataclass(frozen=True)
class Guided:
    """An estimate under classifier-free guidance."""

    estimate: CleanEstimator
    empty: Conditioning
    """Conditioning of the empty prompt, batch 1."""
    guidance_scale: float
    """Guidance scale. 1 means no guidance, so the denoiser computes half as many samples."""

    def __call__(
        self, x: Tensor, timesteps: Tensor, conditioning: Conditioning, step_counts: Tensor | None = None
    ) -> Tensor:
        """Return estimates of x_0, shaped as x. One call computes both halves of the guidance."""
        if self.guidance_scale == 1.0:
            return self.estimate(x, timesteps, conditioning, step_counts)
        both = Conditioning.cat(conditioning, self.empty.expand(len(x)))
        counts = None if step_counts is None else torch.cat([step_counts, step_counts])
        conditional, unconditional = self.estimate(
            torch.cat([x, x]), torch.cat([timesteps, timesteps]), both, counts
        ).chunk(2)
        return guided(conditional, unconditional, self.guidance_scale)


class Roles(Protocol):
    """The three networks of score distillation, with or without shared weights."""

    teacher: CleanEstimator
    student: CleanEstimator
    fake: CleanEstimator

    def module(self, role: TrainedRole) -> nn.Module:
        """Return the module that the role's optimizer trains and its saved state holds."""
        ...

    def activate(self, role: TrainedRole) -> None:
        """Prepare the role's backward pass, because recomputed activations must be the role's own."""
        ...


class SeparateRoles:
    """Roles for full fine-tuning: teacher, student and fake score are three copies of a model."""

    def __init__(
        self,
        base: nn.Module,
        coordinates: Coordinates,
        *,
        student: nn.Module | None = None,
        precision: Precision = "bf16",
    ) -> None:
        """Copy `base` for the fake score and the student.

        Args:
            student: Model that the student starts from instead of the base, such as an LCM (Fig. 8).
        """
        fake = copy.deepcopy(base)
        student = copy.deepcopy(base) if student is None else student
        self._modules = {"student": student.train(), "fake": fake.train()}
        self.teacher = CleanEstimator(base.eval().requires_grad_(False), coordinates, precision)
        self.student = CleanEstimator(student, coordinates, precision)
        self.fake = CleanEstimator(fake, coordinates, precision)

    def module(self, role: TrainedRole) -> nn.Module:
        return self._modules[role]

    def activate(self, role: TrainedRole) -> None:
        """Do nothing: the roles share no weights."""


class RoleProjection(nn.Module):
    """Projection of K with weights for each role. It replaces `cond_proj` of diffusers' timestep embedding."""

    def __init__(self, projection: nn.Linear) -> None:
        super().__init__()
        self.roles = nn.ModuleDict({role: copy.deepcopy(projection) for role in ("student", "fake")})
        self.active: TrainedRole = "student"
        self.in_features = projection.in_features

    @property
    def weight(self) -> Tensor:
        """Weight of the active role."""
        projection = self.roles[self.active]
        assert isinstance(projection, nn.Linear)
        return projection.weight

    def forward(self, condition: Tensor) -> Tensor:
        projected: Tensor = self.roles[self.active](condition)
        return projected


class LoraRoles:
    """Roles for LoRA: student and fake score are two adapters on one base. The teacher is the base without adapters."""

    def __init__(
        self,
        base: Denoiser,
        coordinates: Coordinates,
        rank: int,
        alpha: float,
        targets: Sequence[str] = ATTENTION_PROJECTIONS,
        *,
        precision: Precision = "bf16",
        base_precision: Precision = "fp32",
    ) -> None:
        """Put two adapters on `base`.

        Args:
            rank, alpha: Of both adapters, which are float32.
            targets: Ends of the names of the linear layers that get adapters.
            precision: Of the calls.
            base_precision: How the frozen layers are held. bf16 halves their memory and changes no result of calls in
                bf16, which would round the same weights at each call.
        """
        self.base = base
        base.requires_grad_(False)
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), init_lora_weights=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # for the second role
            for role in ("student", "fake"):
                inject_adapter_in_model(config, base.model, adapter_name=role)
        self._layers = [module for module in base.modules() if isinstance(module, BaseTunerLayer)]
        projection = base.timestep_embedding.cond_proj
        self._projection = RoleProjection(projection) if projection is not None else None
        if self._projection is not None:
            base.timestep_embedding.cond_proj = self._projection
            self._projection.requires_grad_(True)
        self._adapters = {role: self._collect(role) for role in ("student", "fake")}
        is_half = base_precision == "bf16"
        if is_half:
            for weight in weights_for_bf16(base):
                weight.data = weight.data.to(torch.bfloat16)
        self.teacher = CleanEstimator(base, coordinates, precision, self._switch_off, is_half)
        self.student = CleanEstimator(base, coordinates, precision, lambda: self.activate("student"), is_half)
        self.fake = CleanEstimator(base, coordinates, precision, lambda: self.activate("fake"), is_half)

    def _collect(self, role: str) -> nn.ParameterDict:
        """Return the role's parameters by their names in the base. A ParameterDict allows no dots, so they become /."""
        marks = (f".{role}.", f".roles.{role}.")
        named = {
            name.replace(".", "/"): p for name, p in self.base.named_parameters() if any(mark in name for mark in marks)
        }
        return nn.ParameterDict(named)

    def module(self, role: TrainedRole) -> nn.Module:
        return self._adapters[role]

    def activate(self, role: TrainedRole) -> None:
        for layer in self._layers:
            layer.enable_adapters(True)
            layer.set_adapter(role)
        if self._projection is not None:
            self._projection.active = role
        # peft freezes every adapter but the active one, but the graph of the other role still needs its gradients.
        for adapter in self._adapters.values():
            adapter.requires_grad_(True)

    def _switch_off(self) -> None:
        for layer in self._layers:
            layer.enable_adapters(False)


def weights_for_bf16(base: Denoiser) -> list[nn.Parameter]:
    """Return the weights of a base that may be held in bf16: those of layers that autocast computes in bf16.

    Norms, embeddings, adapters and the small layers that read the timestep stay float32.
    """
    layers = [
        module
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd) and ".lora_" not in name
    ]
    small = set(base.timestep_embedding.modules())
    return [weight for layer in layers if layer not in small for weight in layer.parameters()]
