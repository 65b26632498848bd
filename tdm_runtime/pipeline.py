"""The reference loop: one picture, nothing shared. `DiffusionEngine` must give the same pictures."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tdm_runtime.errors import NotFiniteError
from tdm_runtime.model.decoder import Pixels
from tdm_runtime.model.loaded_model import LoadedModel, denoise
from tdm_runtime.params import SamplingParams
from tdm_runtime.sampling.sampler import solve

OnPreview = Callable[[int, Pixels], None]
"""Called with the number of steps taken and a picture, uint8 [H, W, 3]; of a clip its first frame, [1, H, W, 3]."""


@torch.inference_mode()
def generate(model: LoadedModel, params: SamplingParams, on_preview: OnPreview | None = None) -> Pixels:
    """Make one picture, uint8 [H, W, 3], or one clip, uint8 [F, H, W, 3].

    Args:
        on_preview: Called after every step but the last with the picture that this step expects.

    Raises:
        InvalidRequestError: the checkpoint does not serve these parameters.
        NotFiniteError: the model produced NaN or infinity.
    """
    model.check(params)
    table = model.step_table(params)
    device = model.denoiser.device
    prompt = model.conditioning(model.embedding(params), params)
    step_counts = torch.tensor([params.num_inference_steps], device=device)
    start = model.start(params)

    def predict(latents: Tensor, timesteps: Tensor) -> Tensor:
        return denoise([model], latents, timesteps, step_counts, prompt, [model.lora_factor(params)])

    steps = solve(table, start.initial[None], predict, start.noise.of_step, start.known)
    for steps_taken, step in enumerate(steps, start=1):
        latents, denoised = step
        if on_preview is not None and steps_taken < table.num_inference_steps:
            on_preview(steps_taken, model.decoders[model.preview_decoder].preview(denoised)[0])
    if not torch.isfinite(latents).all():
        raise NotFiniteError("the model produced NaN or infinity for this request; no picture was made")
    picture: Pixels = model.decoders[params.decoder].decode(latents)[0]
    return picture if params.edit is None else params.edit.blended(picture)
