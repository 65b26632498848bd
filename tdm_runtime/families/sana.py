"""SANA-Sprint: a Gemma2 text encoder and SanaTransformer2DModel, distilled to the noise of TrigFlow.

TrigFlow (arXiv 2410.11081, sec. 4.1) writes x = cos(t) x_0 + sin(t) noise, with t from 0 to pi / 2. Timesteps of this
family are these angles. Latents are in units of sigma_data, so that x_0 and noise have unit variance: the factor that
SanaSprintPipeline multiplies at the start and divides by before each call and at the end cancels out.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from types import MethodType
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

from tdm_runtime.backends.interface import DType
from tdm_runtime.errors import CheckpointError
from tdm_runtime.families.conditioning import Conditioning
from tdm_runtime.families.denoiser import Denoiser, PassedCondition, require, require_outputs
from tdm_runtime.families.family import Family, TextEncoders

if TYPE_CHECKING:
    from diffusers import SanaTransformer2DModel

GUIDANCE_SCALE = 4.5
"""Guidance scale that the model reads, the default of the pipeline."""


class SanaDenoiser(Denoiser):
    """Turns a network of flow matching into one of TrigFlow (SANA-Sprint, arXiv 2503.09641, sec. 3.1).

    It passes K on by `PassedCondition`, as the transformer has no argument for it.
    """

    timestep_embedding_name = "time_embed.timestep_embedder"
    text_dim_name = "caption_channels"

    def __init__(self, model: SanaTransformer2DModel) -> None:
        super().__init__(model)
        require_outputs(model, (self.latent_channels,))
        if not model.config.guidance_embeds:
            raise CheckpointError("SanaTransformer2DModel has guidance_embeds false; use a checkpoint of SANA-Sprint")
        self._passed = PassedCondition(self.timestep_embedding)

    def conditioning_inputs(self, tokens: int | str) -> Mapping[str, tuple[DType, Sequence[int | str]]]:
        return {"attention_mask": ("int64", (tokens,)), "guidance": ("float32", ())}

    def predict(self, latents: Tensor, timesteps: Tensor, condition: Tensor | None, prompt: Conditioning) -> Tensor:
        """Call the transformer with latents x [B, C, H, W] and angles t [B].

        The network reads x as flow matching has it: noise share s = sin(t) / (sin(t) + cos(t)), latents scaled to
        (1 - s) x_0 + s noise.

        Returns:
            F [B, C, H, W], where x_0 = cos(t) x - sin(t) F: a v_prediction with alpha = cos(t), sigma = sin(t).
        """
        guidance = require("guidance", prompt.guidance, "SANA-Sprint")
        sine, cosine = timesteps.sin(), timesteps.cos()
        share = sine / (cosine + sine)
        s = share.view(-1, 1, 1, 1)
        scale = torch.sqrt(s**2 + (1 - s) ** 2)
        flow_latents = latents * scale
        with self._passed.during(condition):
            output: Tensor = self.model(
                flow_latents.to(latents.dtype),
                encoder_hidden_states=prompt.prompt_embeds,
                encoder_attention_mask=prompt.attention_mask,
                guidance=guidance * self.model.config.guidance_embeds_scale,
                timestep=share,
                return_dict=False,
            )[0]
        return ((1 - 2 * s) * flow_latents + (1 - 2 * s + 2 * s**2) * output) / scale


@final
class Sana(Family):
    """Family of `SanaSprintPipeline`. SanaPipeline, which needs many steps, is of no family."""

    name = "sana"
    pipelines = ("SanaSprintPipeline",)
    denoiser_class = "SanaTransformer2DModel"
    adapter = SanaDenoiser
    vae_classes = ("AutoencoderDC",)

    def spatial_compression(self, vae: Mapping[str, Any]) -> int:
        levels = vae.get("encoder_block_out_channels")
        if not isinstance(levels, list | tuple):
            raise CheckpointError(
                "vae/config.json lacks encoder_block_out_channels; restore the folder from its source"
            )
        return int(2 ** (len(levels) - 1))

    def max_tokens(self, encoders: TextEncoders) -> int:
        return 300

    def encode_prompts(self, prompts: list[str], encoders: TextEncoders) -> Conditioning:
        """Encode prompts behind the instruction that is the default of the pipeline's call."""
        pipeline = encoders.pipeline
        defaults = inspect.signature(type(pipeline).__call__).parameters
        embeds, mask = pipeline.encode_prompt(
            prompts,
            device=encoders.device,
            complex_human_instruction=defaults["complex_human_instruction"].default,
        )
        guidance = torch.full((len(prompts),), GUIDANCE_SCALE, device=encoders.device)
        return Conditioning(embeds, attention_mask=mask, guidance=guidance)

    def replacement(self, part: nn.Module) -> tuple[str, Any] | None:
        from diffusers.models.attention_processor import (
            Attention,
            SanaLinearAttnProcessor2_0,
            SanaMultiscaleLinearAttention,
        )

        if isinstance(part, SanaMultiscaleLinearAttention):
            return "apply_linear_attention", _linear_attention
        if isinstance(part, Attention) and isinstance(part.processor, SanaLinearAttnProcessor2_0):
            return "forward", MethodType(_self_attention, part)
        return None


def _linear_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Mix values [..., D, N] by the weights query^T key, which are not negative, in time linear in N.

    Where all weights of a query are zero, diffusers divides by the 1e-15 that it adds to their sum. OpenVINO drops
    the addition of so small a number and divides by zero; it keeps a lower bound.
    """
    mixed = value @ key.transpose(-1, -2) @ query
    total = key.sum(dim=-1)[..., None, :] @ query
    return mixed / total.clamp(min=1e-15)


def _self_attention(self: Any, hidden_states: Tensor) -> Tensor:
    """Attention.forward [B, N, D] by SanaLinearAttnProcessor2_0, with `_linear_attention`."""
    dtype = hidden_states.dtype
    query, key, value = self.to_q(hidden_states), self.to_k(hidden_states), self.to_v(hidden_states)
    if self.norm_q is not None:
        query, key = self.norm_q(query), self.norm_k(key)
    query, key, value = (x.transpose(1, 2).unflatten(1, (self.heads, -1)).float() for x in (query, key, value))
    mixed = _linear_attention(query.relu(), key.relu(), value)
    output: Tensor = self.to_out[0](mixed.flatten(1, 2).transpose(1, 2).to(dtype))
    return output.clip(-65504, 65504) if dtype == torch.float16 else output
