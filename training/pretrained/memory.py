"""Memory that a distillation holds on one device between its calls, from its settings and the denoiser's shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from torch import nn

from tdm_runtime.families import Denoiser
from training.config import DistillConfig
from training.methods.roles import weights_for_bf16

FLOAT_BYTES, HALF_BYTES = 4, 2


@dataclass(frozen=True)
class StateMemory:
    """Bytes of weights, gradients and optimizers on one device. Student and fake score are trained."""

    frozen: int
    """Teacher, or the base that LoRA adapters share."""
    trained: int
    """Weights of student and fake score: whole copies, or adapters."""
    gradients: int
    moments: int
    """AdamW's two moments."""
    average: int
    """Average of the student's weights, which a run saves."""
    discriminator: int
    """Discriminator of TDM-unify-GAN with gradients and moments; 0 without."""

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return sum(getattr(self, part.name) for part in fields(self))


def state_memory(config: DistillConfig, denoiser: Denoiser, lora_targets: Sequence[str]) -> StateMemory:
    """Return what a distillation holds between its calls.

    Args:
        denoiser: may be on the meta device.
        lora_targets: ends of the names of the linear layers that get adapters (`Family.lora_targets`).
    """
    base = sum(weight.numel() for weight in denoiser.parameters())
    trained = lora_weights(config, denoiser, lora_targets) if config.lora_rank else base
    halved = sum(weight.numel() for weight in weights_for_bf16(denoiser)) if config.base_precision == "bf16" else 0
    return StateMemory(
        frozen=base * FLOAT_BYTES - halved * (FLOAT_BYTES - HALF_BYTES),
        trained=2 * trained * FLOAT_BYTES,
        gradients=2 * trained * FLOAT_BYTES,
        moments=4 * trained * FLOAT_BYTES,
        average=trained * FLOAT_BYTES,
        discriminator=4 * base * FLOAT_BYTES if config.adversarial_weight else 0,
    )


def lora_weights(config: DistillConfig, denoiser: nn.Module, lora_targets: Sequence[str]) -> int:
    """Return the number of weights of one LoRA adapter."""
    layers = [
        module
        for name, module in denoiser.named_modules()
        if isinstance(module, nn.Linear) and any(f".{name}".endswith(f".{target}") for target in lora_targets)
    ]
    return sum(config.lora_rank * (layer.in_features + layer.out_features) for layer in layers)
