"""Stable Diffusion 3 and 3.5: two CLIP text encoders, a T5 and SD3Transformer2DModel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, final

from torch import Tensor

from tdm_runtime.backends.interface import DType
from tdm_runtime.families.conditioning import Conditioning
from tdm_runtime.families.denoiser import Denoiser, PassedCondition, require, require_outputs
from tdm_runtime.families.family import ATTENTION_PROJECTIONS, Family, TextEncoders

if TYPE_CHECKING:
    from diffusers import SD3Transformer2DModel

T5_TOKENS = 256
"""Tokens that T5 reads, the default of the pipeline."""


class SD3Denoiser(Denoiser):
    """Passes K on by `PassedCondition`, as the transformer has no argument for it."""

    timestep_embedding_name = "time_text_embed.timestep_embedder"
    text_dim_name = "joint_attention_dim"

    def __init__(self, model: SD3Transformer2DModel) -> None:
        super().__init__(model)
        require_outputs(model, (self.latent_channels,))
        self._passed = PassedCondition(self.timestep_embedding)

    def conditioning_inputs(self, tokens: int | str) -> Mapping[str, tuple[DType, Sequence[int | str]]]:
        return {"pooled_prompt_embeds": ("float32", (self.model.config.pooled_projection_dim,))}

    def predict(self, latents: Tensor, timesteps: Tensor, condition: Tensor | None, prompt: Conditioning) -> Tensor:
        """Call the transformer with latents [B, 16, H, W] and timesteps of sigma * 1000.

        attention_mask is unread, as in stock pipelines.
        """
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


@final
class StableDiffusion3(Family):
    """Family of `StableDiffusion3Pipeline`."""

    name = "sd3"
    pipelines = ("StableDiffusion3Pipeline",)
    denoiser_class = "SD3Transformer2DModel"
    adapter = SD3Denoiser
    # The text stream has projections of its own; the published SD3.5 adapter trains them too.
    lora_targets = (*ATTENTION_PROJECTIONS, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    tokenizers = ("tokenizer", "tokenizer_2", "tokenizer_3")
    text_encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    optional_text = ("text_encoder_3", "tokenizer_3")

    def max_tokens(self, encoders: TextEncoders) -> int:
        return super().max_tokens(encoders) if encoders.pipeline.text_encoder_3 is None else T5_TOKENS

    def encode_prompts(self, prompts: list[str], encoders: TextEncoders) -> Conditioning:
        """Encode prompts. Without T5 the pipeline takes zeros in its place, as wide as the transformer says."""
        if encoders.pipeline.text_encoder_3 is None:
            width = encoders.denoiser_config["joint_attention_dim"]
            encoders.pipeline.transformer = SimpleNamespace(config=SimpleNamespace(joint_attention_dim=width))
        embeds, _, pooled, _ = encoders.pipeline.encode_prompt(
            prompts, None, None, device=encoders.device, do_classifier_free_guidance=False
        )
        return Conditioning(embeds, pooled)
