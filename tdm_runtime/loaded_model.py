"""A checkpoint in memory, ready to run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from tdm_runtime.backends import DenoiserBackend
from tdm_runtime.backends.torch_eager import TorchBackend
from tdm_runtime.checkpoint import open_checkpoint
from tdm_runtime.decoder import Decoder
from tdm_runtime.errors import RecipeError
from tdm_runtime.models.unet import UNetDenoiser
from tdm_runtime.params import SamplingParams
from tdm_runtime.recipe import RECIPE_FILE, Recipe
from tdm_runtime.text_encoder import TextEncoder


@dataclass(frozen=True)
class LoadedModel:
    """The parts a picture passes through."""

    recipe: Recipe
    digest: str
    """sha256 of the checkpoint's recipe and, through it, of its weights."""
    text_encoder: TextEncoder
    denoiser: DenoiserBackend
    decoder: Decoder
    latent_channels: int

    def latent_shape(self, params: SamplingParams) -> tuple[int, int, int]:
        """[C, H, W] of a request's latents."""
        downscale = self.decoder.downscale
        return (self.latent_channels, params.height // downscale, params.width // downscale)


def load_model(folder: Path, device: str | None = None) -> LoadedModel:
    """Open, check and load a checkpoint.

    Args:
        device: a torch device; by default CUDA where there is one, else the CPU.

    Raises:
        CheckpointError: the folder cannot be served; the message says why and what to do.
    """
    checkpoint = open_checkpoint(folder)
    torch_device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    denoiser = UNetDenoiser(checkpoint.load_unet())
    tokenizer, text_model = checkpoint.load_text_encoder()
    decoder = Decoder(checkpoint.load_vae(), torch_device)
    for width, height in checkpoint.recipe.native_sizes:
        if width % decoder.downscale or height % decoder.downscale:
            raise RecipeError(
                f"{folder / RECIPE_FILE}: native_sizes has {width}x{height}, and the decoder makes multiples of "
                f"{decoder.downscale} pixels only; publish the checkpoint anew with sizes that it was trained at"
            )
    return LoadedModel(
        recipe=checkpoint.recipe,
        digest=checkpoint.digest,
        text_encoder=TextEncoder(tokenizer, text_model, torch_device),
        denoiser=TorchBackend(denoiser, torch_device),
        decoder=decoder,
        latent_channels=denoiser.latent_channels,
    )
