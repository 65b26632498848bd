"""UNet2DConditionModel (Stable Diffusion 1 and 2, SDXL, and the embedded checkpoint)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from tdm_runtime.families.conditioning import Conditioning
from tdm_runtime.families.denoiser import Denoiser, require, require_outputs

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


class UNetDenoiser(Denoiser):
    """K goes in by the UNet's own `timestep_cond`, so stock pipelines can run the checkpoint too."""

    timestep_embedding_name = "time_embedding"

    def __init__(self, model: UNet2DConditionModel) -> None:
        super().__init__(model)
        require_outputs(model, (self.latent_channels,))

    def predict(self, latents: Tensor, timesteps: Tensor, condition: Tensor | None, prompt: Conditioning) -> Tensor:
        """latents [B, C, H, W]; SDXL (`addition_embed_type` "text_time") reads pooled_prompt_embeds and time_ids."""
        added = None
        if self.model.config.addition_embed_type == "text_time":
            added = {
                "text_embeds": require("pooled_prompt_embeds", prompt.pooled_prompt_embeds, "SDXL"),
                "time_ids": require("time_ids", prompt.time_ids, "SDXL"),
            }
        output: Tensor = self.model(
            latents,
            timesteps,
            prompt.prompt_embeds,
            timestep_cond=condition,
            added_cond_kwargs=added,
            encoder_attention_mask=prompt.attention_mask,
            return_dict=False,
        )[0]
        return output

    def add_step_condition(self, dim: int = 256) -> None:
        """As every family, and registered in the config: save_pretrained and from_pretrained keep it."""
        super().add_step_condition(dim)
        self.model.register_to_config(time_cond_proj_dim=self.condition_dim)
