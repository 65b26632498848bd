"""The reference: one picture, one loop, nothing shared. `DiffusionEngine` must equal it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tdm_runtime.errors import NotFiniteError
from tdm_runtime.model.decoder import Pixels
from tdm_runtime.model.loaded_model import LoadedModel, adapter_inputs
from tdm_runtime.params import SamplingParams
from tdm_runtime.sampling.noise import initial_noise
from tdm_runtime.sampling.sampler import apply_step, gather_rows

OnPreview = Callable[[int, Pixels], None]
"""Told the number of steps taken and a picture, uint8 [H, W, 3]."""


@torch.inference_mode()
def generate(model: LoadedModel, params: SamplingParams, on_preview: OnPreview | None = None) -> Pixels:
    """Make one picture, uint8 [H, W, 3].

    Args:
        on_preview: called after every step but the last, with the picture as it would come out there.

    Raises:
        InvalidRequestError: the checkpoint does not serve these parameters.
        NotFiniteError: the model produced NaN or infinity.
    """
    model.check(params)
    table = model.recipe.step_tables[params.num_inference_steps]
    device = model.denoiser.device
    prompt_embeds = model.text_encoder.encode(params.prompt).prompt_embeds[None]
    step_counts = torch.tensor([params.num_inference_steps], device=device)
    noise = initial_noise(params.seed, (1, *model.latent_shape(params)), params.noise_angle)
    latents = table.initial_scale * noise.to(device)
    denoised = torch.zeros_like(latents)
    for step_index in range(table.num_inference_steps):
        rows = gather_rows([(table, step_index)], device)
        model_output = model.denoiser(latents, rows[:, 0], step_counts, prompt_embeds, *adapter_inputs([model]))
        latents, denoised = apply_step(rows, latents, model_output, denoised)
        if on_preview is not None and step_index + 1 < table.num_inference_steps:
            on_preview(step_index + 1, model.decoders[model.preview_decoder].decode(denoised)[0])
    if not torch.isfinite(latents).all():
        raise NotFiniteError("the model produced NaN or infinity for this request; no picture was made")
    picture: Pixels = model.decoders[params.decoder].decode(latents)[0]
    return picture
