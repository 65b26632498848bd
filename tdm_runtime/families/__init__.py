"""One adapter a backbone family: what its denoiser is called with and where K enters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tdm_runtime.errors import CheckpointError
from tdm_runtime.families.cogvideox import CogVideoXDenoiser
from tdm_runtime.families.conditioning import Conditioning
from tdm_runtime.families.denoiser import Denoiser
from tdm_runtime.families.pixart import PixArtDenoiser
from tdm_runtime.families.sd3 import SD3Denoiser
from tdm_runtime.families.unet import UNetDenoiser

__all__ = ["ADAPTERS", "Conditioning", "Denoiser", "denoiser_for"]

ADAPTERS: Mapping[str, type[Denoiser]] = {
    "UNet2DConditionModel": UNetDenoiser,
    "PixArtTransformer2DModel": PixArtDenoiser,
    "SD3Transformer2DModel": SD3Denoiser,
    "CogVideoXTransformer3DModel": CogVideoXDenoiser,
}
"""By the name of the diffusers class: importing the classes themselves would load all of diffusers."""


def denoiser_for(model: Any) -> Denoiser:
    """Return the adapter of a diffusers denoiser, by its class.

    Raises:
        CheckpointError: the class is none of those in `ADAPTERS`.
    """
    for ancestor in type(model).__mro__:
        if adapter := ADAPTERS.get(ancestor.__name__):
            return adapter(model)
    raise CheckpointError(
        f"the denoiser is a {type(model).__name__}; this version knows {', '.join(ADAPTERS)}: use a checkpoint of those"
    )
