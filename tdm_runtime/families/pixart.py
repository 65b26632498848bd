"""PixArt-alpha and PixArt-sigma: a T5 text encoder and PixArtTransformer2DModel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MethodType
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

from tdm_runtime.backends.interface import DType
from tdm_runtime.families.conditioning import Conditioning
from tdm_runtime.families.denoiser import Denoiser, PassedCondition, require_outputs
from tdm_runtime.families.family import Family, TextEncoders
from tdm_runtime.families.positions import length, sines_2d

if TYPE_CHECKING:
    from diffusers import PixArtTransformer2DModel

PIXELS_PER_LATENT = 8


class PixArtDenoiser(Denoiser):
    """Passes K on by `PassedCondition`, as the transformer has no argument for it, and drops the learned variance."""

    timestep_embedding_name = "adaln_single.emb.timestep_embedder"
    text_dim_name = "caption_channels"

    def __init__(self, model: PixArtTransformer2DModel) -> None:
        super().__init__(model)
        require_outputs(model, (self.latent_channels, 2 * self.latent_channels))
        self._passed = PassedCondition(self.timestep_embedding)

    def conditioning_inputs(self, tokens: int | str) -> Mapping[str, tuple[DType, Sequence[int | str]]]:
        return {"attention_mask": ("int64", (tokens,))}

    def predict(self, latents: Tensor, timesteps: Tensor, condition: Tensor | None, prompt: Conditioning) -> Tensor:
        """Call the transformer with latents [B, 4, H, W]; attention_mask hides the padding of the prompt."""
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
        """Return the size in pixels [B, 2] and height / width [B, 1], which only PixArt-alpha of 1024 pixels reads."""
        if not self.model.use_additional_conditions:
            return {"resolution": None, "aspect_ratio": None}
        height, width = latents.shape[-2:]
        one = torch.ones(latents.shape[0], 1, dtype=latents.dtype, device=latents.device)
        sides = [one * (height * PIXELS_PER_LATENT), one * (width * PIXELS_PER_LATENT)]
        return {"resolution": torch.cat(sides, dim=1), "aspect_ratio": one * (height / width)}


@final
class PixArt(Family):
    """Family of `PixArtAlphaPipeline` and `PixArtSigmaPipeline`, which pad prompts to 120 and to 300 tokens."""

    name = "pixart"
    pipelines = ("PixArtAlphaPipeline", "PixArtSigmaPipeline")
    denoiser_class = "PixArtTransformer2DModel"
    former_denoiser_class = "Transformer2DModel"
    adapter = PixArtDenoiser

    def max_tokens(self, encoders: TextEncoders) -> int:
        return 300 if "Sigma" in type(encoders.pipeline).__name__ else 120

    def encode_prompts(self, prompts: list[str], encoders: TextEncoders) -> Conditioning:
        embeds, mask, _, _ = encoders.pipeline.encode_prompt(
            prompts, device=encoders.device, do_classifier_free_guidance=False
        )
        return Conditioning(embeds, attention_mask=mask)

    def replacement(self, part: nn.Module) -> tuple[str, Any] | None:
        from diffusers.models.embeddings import PatchEmbed

        if isinstance(part, PatchEmbed) and part.pos_embed is not None and part.pos_embed_max_size is None:
            return "forward", MethodType(_embed_patches, part)
        return None


def _embed_patches(self: Any, latent: Tensor) -> Tensor:
    """PatchEmbed.forward with the positions computed in tensors; diffusers computes them from the traced size."""
    patches = self.proj(latent)
    tokens = patches.flatten(2).transpose(1, 2)
    if self.norm is not None:
        tokens = self.norm(tokens)

    def positions(size: int) -> Tensor:
        """Stretch a grid of any size over the grid that the model was trained on."""
        counted = torch.arange(size, dtype=torch.float32)
        base_size, scale = float(self.base_size), float(self.interpolation_scale)
        return counted / (length(counted) / base_size) / scale

    rows, columns = (positions(size) for size in patches.shape[-2:])
    embedded: Tensor = (tokens + sines_2d(rows, columns, self.pos_embed.shape[-1])[None]).to(tokens.dtype)
    return embedded
