"""Memory that a distillation holds between its calls, from its settings and the denoiser's shapes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from training.config import DistillConfig

FLOAT_BYTES, HALF_BYTES = 4, 2
TRAINED_BYTES = 4 * FLOAT_BYTES
"""Of a trained weight: itself, its gradient and AdamW's two moments."""


def state_bytes(config: DistillConfig, denoiser: nn.Module, lora_targets: Sequence[str]) -> int:
    """Return the bytes of weights, gradients and optimizers on one device; activations and the VAE come on top.

    Student and fake score are trained, the student's average is kept, and the teacher is frozen. With LoRA adapters,
    all share one base. autocast adds a bf16 copy of the weights of the network whose backward pass is to come.

    Args:
        denoiser: may be on the meta device.
        lora_targets: ends of the names of the linear layers that get adapters (`Family.lora_targets`).
    """
    base = sum(weight.numel() for weight in denoiser.parameters())
    cast = base * (HALF_BYTES if config.precision == "bf16" else 0)
    if config.lora_rank:
        layers = [
            module
            for name, module in denoiser.named_modules()
            if isinstance(module, nn.Linear) and any(f".{name}".endswith(f".{target}") for target in lora_targets)
        ]
        trained = sum(config.lora_rank * (layer.in_features + layer.out_features) for layer in layers)
        frozen = base
    else:
        trained, frozen = base, base
    discriminator = base * TRAINED_BYTES if config.adversarial_weight else 0
    return frozen * FLOAT_BYTES + trained * (2 * TRAINED_BYTES + FLOAT_BYTES) + cast + discriminator
