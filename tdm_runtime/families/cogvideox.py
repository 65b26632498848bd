"""CogVideoXTransformer3DModel (CogVideoX text-to-video)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from tdm_runtime.families.conditioning import Conditioning
from tdm_runtime.families.denoiser import Denoiser, require_outputs

if TYPE_CHECKING:
    from diffusers import CogVideoXTransformer3DModel


class CogVideoXDenoiser(Denoiser):
    """K goes in by the transformer's own `timestep_cond`; its frames come before its channels, ours after."""

    timestep_embedding_name = "time_embedding"

    def __init__(self, model: CogVideoXTransformer3DModel) -> None:
        super().__init__(model)
        require_outputs(model, (self.latent_channels,))
        self.patch_size_t: int = model.config.patch_size_t or 1
        """Latent frames per token; the number of latent frames is a multiple of it."""

    def predict(self, latents: Tensor, timesteps: Tensor, condition: Tensor | None, prompt: Conditioning) -> Tensor:
        """latents [B, C, F, H, W]; attention_mask is unread, as in stock pipelines.

        Without rotary embeddings prompt_embeds must be exactly `max_text_seq_length` tokens long.
        """
        output: Tensor = self.model(
            latents.transpose(1, 2),
            prompt.prompt_embeds,
            timesteps,
            timestep_cond=condition,
            image_rotary_emb=self._rotary_embedding(latents),
            return_dict=False,
        )[0]
        return output.transpose(1, 2)

    def _rotary_embedding(self, latents: Tensor) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines [F * H * W / patches, attention_head_dim], as `CogVideoXPipeline` makes them."""
        config = self.model.config
        if not config.use_rotary_positional_embeddings:
            return None
        from diffusers.models.embeddings import get_3d_rotary_pos_embed
        from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

        frames, height, width = latents.shape[2:]
        grid = (height // self.patch_size, width // self.patch_size)
        base_height, base_width = config.sample_height // self.patch_size, config.sample_width // self.patch_size
        dim, device = config.attention_head_dim, latents.device
        rotary: tuple[Tensor, Tensor]
        if config.patch_size_t is None:  # CogVideoX 1.0 stretches the grid that it was trained on
            crop = get_resize_crop_region_for_grid(grid, base_width, base_height)
            rotary = get_3d_rotary_pos_embed(dim, crop, grid, frames, device=device)
        else:  # CogVideoX 1.5 cuts out of it
            rotary = get_3d_rotary_pos_embed(
                dim,
                None,
                grid,
                frames // self.patch_size_t,
                grid_type="slice",
                max_size=(base_height, base_width),
                device=device,
            )
        return rotary
