"""The one place that knows which tensor of a denoiser call is which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor

from tdm_runtime.families.conditioning import Conditioning

ADAPTERS = "adapters"
"""Input of a denoiser that LoRAs share: the number of each sample's LoRA, int64 [B]."""
LORA_FACTORS = "lora_factors"
"""Input of a denoiser that LoRAs share: a factor on what each sample's LoRA adds, float32 [B]."""

REFERENCES = ("reference_tokens", "reference_positions")
"""Inputs of a denoiser that reads reference pictures; see `Conditioning`."""


def denoiser_arguments(
    names: Sequence[str],
    latents: Tensor,
    timesteps: Tensor,
    step_counts: Tensor | None,
    prompt: Conditioning,
    adapters: Tensor | None = None,
    lora_factors: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Return the tensors of one denoiser call in the order of its interface.

    Args:
        names: Inputs of the denoiser's `Interface`, in order. References, which come last, are left out where the
            prompt has none.
        latents: [B, C, H, W], of clips [B, C, F, H, W].
        timesteps: float32 [B].
        step_counts: K of each sample, int64 [B]. None calls a torch denoiser without K, as a teacher is called.
        prompt: Conditioning of the batch.
        adapters, lora_factors: see `ADAPTERS` and `LORA_FACTORS`.

    Raises:
        ValueError: the denoiser reads a tensor that is None or unknown.
    """
    known = {"latents": latents, "timesteps": timesteps, "step_counts": step_counts}
    known |= {ADAPTERS: adapters, LORA_FACTORS: lora_factors}
    if prompt.reference_tokens is None:
        names = [name for name in names if name not in REFERENCES]
    arguments = tuple(known[name] if name in known else getattr(prompt, name, None) for name in names)
    for name, argument in zip(names, arguments, strict=True):
        if argument is None and name != "step_counts":
            raise ValueError(f"{name} is None and the denoiser reads it; encode prompts with all its text encoders")
    return cast(tuple[Tensor, ...], arguments)  # step_counts may be None, which torch denoisers accept
