"""UNet2DConditionModel (Stable Diffusion family and the embedded checkpoint)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from tdm_runtime.step_condition import embed_step_count

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


class UNetDenoiser(nn.Module):
    """A UNet as every backend and exporter sees it: four tensors in, one out."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet
        self.condition_dim: int | None = unet.config.time_cond_proj_dim
        self.latent_channels: int = unet.config.in_channels

    def forward(self, latents: Tensor, timesteps: Tensor, step_counts: Tensor, prompt_embeds: Tensor) -> Tensor:
        """Predict the model output.

        Args:
            latents: [B, C, H, W].
            timesteps: float [B].
            step_counts: [B], each sample's K; unread where the UNet has no input for it.
            prompt_embeds: [B, L, D].

        Returns:
            [B, C, H, W], of the recipe's prediction type.
        """
        condition = None if self.condition_dim is None else embed_step_count(step_counts, self.condition_dim)
        output: Tensor = self.unet(latents, timesteps, prompt_embeds, timestep_cond=condition, return_dict=False)[0]
        return output
