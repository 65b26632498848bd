"""PixArtTransformer2DModel (PixArt-alpha)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tdm_runtime.families.conditioning import Conditioning
from tdm_runtime.families.denoiser import Denoiser, PassedCondition, require_outputs

if TYPE_CHECKING:
    from diffusers import PixArtTransformer2DModel

PIXELS_PER_LATENT = 8


class PixArtDenoiser(Denoiser):
    """Calls the transformer, which itself passes no K on, and drops the learned variance."""

    timestep_embedding_name = "adaln_single.emb.timestep_embedder"

    def __init__(self, model: PixArtTransformer2DModel) -> None:
        super().__init__(model)
        require_outputs(model, (self.latent_channels, 2 * self.latent_channels))
        self._passed = PassedCondition(self.timestep_embedding)

    def predict(self, latents: Tensor, timesteps: Tensor, condition: Tensor | None, prompt: Conditioning) -> Tensor:
        """latents [B, 4, H, W]; attention_mask hides the padding of the prompt."""
        with self._passed.during(condition):
            output: Tensor = self.model(
                latents,
                encoder_hidden_states=prompt.prompt_embeds,
                timestep=timesteps,
                added_cond_kwargs=self._size_conditions(latents),
                encoder_attention_mask=prompt.attention_mask,
                return_dict=False,
            )[0]
        return output[:, : self.latent_channels]

    def _size_conditions(self, latents: Tensor) -> dict[str, Tensor | None]:
        """The 1024 pixel models are told the size in pixels, [B, 2], and height / width, [B, 1]."""
        if not self.model.use_additional_conditions:
            return {"resolution": None, "aspect_ratio": None}
        height, width = latents.shape[-2:]
        one = torch.ones(latents.shape[0], 1, dtype=latents.dtype, device=latents.device)
        sides = [one * (height * PIXELS_PER_LATENT), one * (width * PIXELS_PER_LATENT)]
        return {"resolution": torch.cat(sides, dim=1), "aspect_ratio": one * (height / width)}
