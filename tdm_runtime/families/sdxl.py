"""Stable Diffusion XL: two CLIP text encoders and a UNet that also reads the size of the picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor

from tdm_runtime.backends.interface import DType
from tdm_runtime.families.conditioning import Conditioning
from tdm_runtime.families.denoiser import require
from tdm_runtime.families.family import TextEncoders
from tdm_runtime.families.prompt_weights import Chunk, weighted
from tdm_runtime.families.unet import UNetDenoiser, UNetFamily, clip_states

TIME_IDS = 6
"""Numbers of a picture's size and crop that the UNet reads."""


class SDXLDenoiser(UNetDenoiser):
    """The UNet reads pooled_prompt_embeds and time_ids too (`addition_embed_type` "text_time")."""

    def conditioning_inputs(self, tokens: int | str) -> Mapping[str, tuple[DType, Sequence[int | str]]]:
        config = self.model.config
        pooled_dim = config.projection_class_embeddings_input_dim - TIME_IDS * config.addition_time_embed_dim
        inputs: dict[str, tuple[DType, Sequence[int | str]]] = {"pooled_prompt_embeds": ("float32", (pooled_dim,))}
        return inputs | {"time_ids": ("float32", (TIME_IDS,))} | dict(super().conditioning_inputs(tokens))

    def _added_conditions(self, prompt: Conditioning) -> dict[str, Tensor]:
        return {
            "text_embeds": require("pooled_prompt_embeds", prompt.pooled_prompt_embeds, "SDXL"),
            "time_ids": require("time_ids", prompt.time_ids, "SDXL"),
        }


@final
class SDXL(UNetFamily):
    """Family of `StableDiffusionXLPipeline`."""

    name = "sdxl"
    pipelines = ("StableDiffusionXLPipeline",)
    adapter = SDXLDenoiser
    tokenizers = ("tokenizer", "tokenizer_2")
    text_encoders = ("text_encoder", "text_encoder_2")
    _reads_picture_size = True

    def decoder_dtype(self, vae: Mapping[str, Any], dtype: torch.dtype) -> torch.dtype:
        """Return float32 for a float16 model whose VAE says `force_upcast`, as the stock pipeline decodes."""
        return torch.float32 if dtype == torch.float16 and vae.get("force_upcast", True) else dtype

    def time_ids(self, width: int, height: int) -> tuple[float, ...]:
        """Return original size, crop and target size; the pipeline takes the size asked for as both."""
        return (float(height), float(width), 0.0, 0.0, float(height), float(width))

    def encode_prompts(self, prompts: list[str], encoders: TextEncoders) -> Conditioning:
        """Encode prompts. If the pipeline says `force_zeros_for_empty_prompt`, "" becomes zeros."""
        pipeline, device = encoders.pipeline, encoders.device
        embeds, _, pooled, _ = pipeline.encode_prompt(prompts, device=device, do_classifier_free_guidance=False)
        if pipeline.config.force_zeros_for_empty_prompt:
            is_given = torch.tensor([prompt != "" for prompt in prompts], device=device)
            embeds, pooled = embeds * is_given[:, None, None], pooled * is_given[:, None]
        time_ids = torch.tensor([self.time_ids(encoders.width, encoders.height)], device=device)
        return Conditioning(embeds, pooled, time_ids=time_ids.repeat(len(prompts), 1))

    def encode_chunks(self, chunks: Sequence[Chunk], encoders: TextEncoders) -> Conditioning:
        """Encode one prompt. Each encoder's states are weighted alone; the pooled ones are the first chunk's."""
        first, second = (clip_states(encoders, number, chunks) for number in (0, 1))
        embeds = torch.cat([weighted(states.hidden_states[-2], chunks) for states in (first, second)], dim=-1)
        time_ids = torch.tensor([self.time_ids(encoders.width, encoders.height)], device=encoders.device)
        return Conditioning(embeds, second[0][:1], time_ids=time_ids)
