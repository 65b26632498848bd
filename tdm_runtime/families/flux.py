"""FLUX.1 [schnell] and [dev]: a CLIP, a T5 and FluxTransformer2DModel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MethodType
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from tdm_runtime.backends.interface import DType
from tdm_runtime.families.conditioning import Conditioning
from tdm_runtime.families.denoiser import Denoiser, PassedCondition, require, require_outputs
from tdm_runtime.families.family import ATTENTION_PROJECTIONS, Family, TextEncoders
from tdm_runtime.families.latent_space import LatentGeometry
from tdm_runtime.families.positions import rotary_embedding

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel

PATCH_SIZE = 2
"""Latents per token side. The pipeline packs them; the transformer's own patch_size is 1."""
SCHNELL_TOKENS = 256
"""T5 tokens that [schnell] was distilled with. The pipeline's users pass it as `max_sequence_length`."""
DEV_TOKENS = 512
"""T5 tokens of [dev], the pipeline's default."""
DEV_GUIDANCE = 3.5
"""The pipeline's default `guidance_scale`."""


class FluxDenoiser(Denoiser):
    """Packs 2x2 latents into each token and unpacks the output. K passes by `PassedCondition`."""

    timestep_embedding_name = "time_text_embed.timestep_embedder"
    text_dim_name = "joint_attention_dim"

    def __init__(self, model: FluxTransformer2DModel) -> None:
        super().__init__(model)
        require_outputs(model, (self.latent_channels,))
        self.latent_channels //= PATCH_SIZE**2
        self.patch_size = PATCH_SIZE
        self._passed = PassedCondition(self.timestep_embedding)

    def conditioning_inputs(self, tokens: int | str) -> Mapping[str, tuple[DType, Sequence[int | str]]]:
        pooled: dict[str, tuple[DType, Sequence[int | str]]] = {
            "pooled_prompt_embeds": ("float32", (self.model.config.pooled_projection_dim,))
        }
        return pooled | {"guidance": ("float32", ())} if self.model.config.guidance_embeds else pooled

    def predict(self, latents: Tensor, timesteps: Tensor, condition: Tensor | None, prompt: Conditioning) -> Tensor:
        """Call the transformer with latents [B, 16, H, W], packed to [B, H * W / 4, 64], and timesteps of sigma * 1000.

        Every text token has the position (0, 0, 0), every image token (0, row, column). guidance is read where the
        model was distilled with it; attention_mask is unread, as in stock pipelines.
        """
        for size in latents.shape[-2:]:  # otherwise torch.export ties the program to the traced size
            torch._check(size % PATCH_SIZE == 0)  # type: ignore[no-untyped-call]
        tokens = pixel_unshuffle(latents, PATCH_SIZE)
        rows, columns = (torch.arange(size, device=latents.device) for size in tokens.shape[-2:])
        output: Tensor
        with self._passed.during(condition):
            output = self.model(
                hidden_states=tokens.flatten(2).transpose(1, 2),
                encoder_hidden_states=prompt.prompt_embeds,
                pooled_projections=require("pooled_prompt_embeds", prompt.pooled_prompt_embeds, "FLUX.1"),
                timestep=timesteps / 1000,  # the transformer multiplies by 1000 again
                img_ids=torch.cartesian_prod(torch.zeros_like(rows[:1]), rows, columns),
                txt_ids=rows.new_zeros(prompt.prompt_embeds.shape[1], 3),
                guidance=self._guidance(prompt),
                return_dict=False,
            )[0]
        return pixel_shuffle(output.transpose(1, 2).reshape(tokens.shape), PATCH_SIZE)

    def _guidance(self, prompt: Conditioning) -> Tensor | None:
        """Return the guidance scale [B], such as 3.5; None for a model without an input for it.

        Raises:
            ValueError: the model reads it, and it is None.
        """
        if not self.model.config.guidance_embeds:
            return None
        if prompt.guidance is None:
            raise ValueError(
                f"guidance is None; FLUX.1 [dev] reads it: give a scale for each sample, e.g. {DEV_GUIDANCE}"
            )
        return prompt.guidance


@final
class Flux(Family):
    """Family of `FluxPipeline`."""

    name = "flux"
    pipelines = ("FluxPipeline",)
    denoiser_class = "FluxTransformer2DModel"
    adapter = FluxDenoiser
    # The text stream has projections of its own. Blocks of one stream have no to_out: their proj_out also ends the MLP.
    lora_targets = (*ATTENTION_PROJECTIONS, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    tokenizers = ("tokenizer", "tokenizer_2")
    text_encoders = ("text_encoder", "text_encoder_2")

    def geometry(self, denoiser: Mapping[str, Any], vae: Mapping[str, Any]) -> LatentGeometry:
        geometry = super().geometry(denoiser, vae)
        return replace(geometry, channels=geometry.channels // PATCH_SIZE**2, patch_size=PATCH_SIZE)

    def max_tokens(self, encoders: TextEncoders) -> int:
        return DEV_TOKENS if _is_dev(encoders) else SCHNELL_TOKENS

    def encode_prompts(self, prompts: list[str], encoders: TextEncoders) -> Conditioning:
        """Encode prompts by T5, with CLIP's pooled output beside.

        T5 reads 256 tokens for [schnell] and 512 for [dev], padding included, and without a mask. [dev] gets the
        pipeline's default guidance scale.
        """
        embeds, pooled, _ = encoders.pipeline.encode_prompt(
            prompts, device=encoders.device, max_sequence_length=self.max_tokens(encoders)
        )
        guidance = torch.full((len(prompts),), DEV_GUIDANCE, device=embeds.device) if _is_dev(encoders) else None
        return Conditioning(embeds, pooled, guidance=guidance)

    def replacement(self, part: nn.Module) -> tuple[str, Any] | None:
        from diffusers.models.transformers.transformer_flux import FluxPosEmbed

        return ("forward", MethodType(rotary_embedding, part)) if isinstance(part, FluxPosEmbed) else None


def _is_dev(encoders: TextEncoders) -> bool:
    """Return whether the denoiser reads a guidance scale, as that of [dev] does and that of [schnell] does not."""
    return bool(encoders.denoiser_config.get("guidance_embeds"))
