"""Registry of model families: one file a family, read by training, export and serving alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tdm_runtime.errors import CheckpointError
from tdm_runtime.families.animatediff import AnimateDiff
from tdm_runtime.families.cogvideox import CogVideoX
from tdm_runtime.families.conditioning import Conditioning
from tdm_runtime.families.denoiser import Denoiser
from tdm_runtime.families.family import Family
from tdm_runtime.families.flux import Flux
from tdm_runtime.families.flux2 import Flux2
from tdm_runtime.families.latent_space import DecoderModule
from tdm_runtime.families.pixart import PixArt
from tdm_runtime.families.sana import Sana
from tdm_runtime.families.sd3 import StableDiffusion3
from tdm_runtime.families.sdxl import SDXL
from tdm_runtime.families.stable_diffusion import StableDiffusion
from tdm_runtime.families.wan import Wan
from tdm_runtime.families.z_image import ZImage

__all__ = [
    "FAMILIES",
    "Conditioning",
    "DecoderModule",
    "Denoiser",
    "Family",
    "current_name",
    "decoder_for",
    "denoiser_for",
    "family_of_model",
    "family_of_pipeline",
    "family_of_vae",
]

FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        StableDiffusion(),
        SDXL(),
        PixArt(),
        StableDiffusion3(),
        Flux(),
        Flux2(),
        ZImage(),
        Sana(),
        CogVideoX(),
        Wan(),
        AnimateDiff(),
    )
}
"""Name -> family."""


def current_name(name: str) -> str:
    """Return a family's name today for one that an earlier version wrote; other names come back unchanged."""
    return next((family.name for family in FAMILIES.values() if family.former_name == name), name)


def family_of_pipeline(class_name: str) -> Family | None:
    """Return the family that opens a pipeline, by the `_class_name` of model_index.json; None for unknown ones."""
    return next((family for family in FAMILIES.values() if class_name in family.pipelines), None)


def family_of_model(model: Any) -> Family:
    """Return the family of a diffusers denoiser.

    Raises:
        CheckpointError: it is the denoiser of no family.
    """
    for family in FAMILIES.values():
        if family.is_denoiser(model):
            return family
    known = dict.fromkeys(family.denoiser_class for family in FAMILIES.values())
    raise CheckpointError(
        f"the denoiser is a {type(model).__name__}; this version knows {', '.join(known)}: use a checkpoint of those"
    )


def denoiser_for(model: Any) -> Denoiser:
    """Return the adapter of a diffusers denoiser.

    Raises:
        CheckpointError: it is the denoiser of no family.
    """
    return family_of_model(model).adapter(model)


def decoder_for(vae: Any) -> DecoderModule:
    """Return the module that decodes with a diffusers VAE.

    Raises:
        CheckpointError: it is the VAE of no family.
    """
    return family_of_vae(vae).decoder(vae)


def family_of_vae(vae: Any) -> Family:
    """Return the first family that decodes with a diffusers VAE. Families that share a VAE decode alike.

    Raises:
        CheckpointError: it is the VAE of no family.
    """
    name = type(vae).__name__
    for family in FAMILIES.values():
        if name in family.vae_classes:
            return family
    known = dict.fromkeys(name for family in FAMILIES.values() for name in family.vae_classes)
    raise CheckpointError(f"the VAE is a {name}; this version knows {', '.join(known)}: use a checkpoint of those")
