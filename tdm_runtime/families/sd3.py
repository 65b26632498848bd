"""SD3Transformer2DModel (Stable Diffusion 3 and 3.5)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from tdm_runtime.families.conditioning import Conditioning
from tdm_runtime.families.denoiser import Denoiser, PassedCondition, require, require_outputs

if TYPE_CHECKING:
    from diffusers import SD3Transformer2DModel


class SD3Denoiser(Denoiser):
    """Calls the transformer, which itself passes no K on."""

    timestep_embedding_name = "time_text_embed.timestep_embedder"

    def __init__(self, model: SD3Transformer2DModel) -> None:
        super().__init__(model)
        require_outputs(model, (self.latent_channels,))
        self._passed = PassedCondition(self.timestep_embedding)

    def predict(self, latents: Tensor, timesteps: Tensor, condition: Tensor | None, prompt: Conditioning) -> Tensor:
        """latents [B, 16, H, W]; timesteps are sigma * 1000; attention_mask is unread, as in stock pipelines."""
        pooled = require("pooled_prompt_embeds", prompt.pooled_prompt_embeds, "Stable Diffusion 3")
        with self._passed.during(condition):
            output: Tensor = self.model(
                latents,
                encoder_hidden_states=prompt.prompt_embeds,
                pooled_projections=pooled,
                timestep=timesteps,
                return_dict=False,
            )[0]
        return output
