"""Z-Image: a Qwen3 text encoder and ZImageTransformer2DModel, which reads prompts without their padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MethodType
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from tdm_runtime.backends.interface import DType
from tdm_runtime.families.conditioning import Conditioning
from tdm_runtime.families.denoiser import Denoiser, PassedCondition, require
from tdm_runtime.families.family import Family, TextEncoders
from tdm_runtime.families.latent_space import LatentGeometry

if TYPE_CHECKING:
    from diffusers import ZImageTransformer2DModel

PATCH_SIZE = 2
"""Latents per token side: the default of the transformer's `forward`, which its pipeline keeps."""
MAX_TOKENS = 512
"""Tokens of the longest prompt, the default of the pipeline."""
TOKEN_MULTIPLE = 32
"""The transformer fills prompt and picture up to multiples of it (`SEQ_MULTI_OF` in diffusers)."""


class _AddedCondition(PassedCondition):
    """Adds the projected K to the sinusoid, as diffusers' TimestepEmbedding does; Z-Image's own embedder cannot."""

    def __init__(self, embedder: Any) -> None:
        super().__init__(embedder.mlp)
        self._embedder = embedder

    def _add(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._condition is None:
            return None
        return (args[0] + self._embedder.cond_proj(self._condition),), kwargs


class ZImageDenoiser(Denoiser):
    """The transformer's time runs from 0 for noise to 1, and its output points the same way; ours are turned round."""

    timestep_embedding_name = "t_embedder"
    text_dim_name = "cap_feat_dim"

    def __init__(self, model: ZImageTransformer2DModel) -> None:
        super().__init__(model)
        self.patch_size = PATCH_SIZE
        if not hasattr(self.timestep_embedding, "cond_proj"):
            self.timestep_embedding.register_module("cond_proj", None)
        self._passed = _AddedCondition(self.timestep_embedding)

    @property
    def sinusoid_layer(self) -> nn.Linear:
        layer: nn.Linear = self.timestep_embedding.mlp[0]
        return layer

    def conditioning_inputs(self, tokens: int | str) -> Mapping[str, tuple[DType, Sequence[int | str]]]:
        return {"attention_mask": ("int64", (tokens,))}

    def predict(self, latents: Tensor, timesteps: Tensor, condition: Tensor | None, prompt: Conditioning) -> Tensor:
        """Call the transformer with latents [B, C, H, W] and timesteps of sigma * 1000.

        The padding of prompt_embeds, which attention_mask marks, stands behind the prompts. It is cut off, as the
        transformer pads each prompt by learned tokens and places the picture behind them.
        """
        mask = require("attention_mask", prompt.attention_mask, "Z-Image")
        lengths = mask.sum(dim=1).tolist()
        with self._passed.during(condition):
            outputs: list[Tensor] = self.model(
                list(latents.unsqueeze(2)),  # each [C, 1, H, W], a clip of one frame
                (1000 - timesteps) / 1000,
                [embeds[:length] for embeds, length in zip(prompt.prompt_embeds, lengths, strict=True)],
                return_dict=False,
            )[0]
        return -torch.stack(outputs).squeeze(2)


@final
class ZImage(Family):
    """Family of `ZImagePipeline`."""

    name = "z_image"
    pipelines = ("ZImagePipeline",)
    denoiser_class = "ZImageTransformer2DModel"
    adapter = ZImageDenoiser

    def geometry(self, denoiser: Mapping[str, Any], vae: Mapping[str, Any]) -> LatentGeometry:
        return replace(super().geometry(denoiser, vae), patch_size=PATCH_SIZE)

    def max_tokens(self, encoders: TextEncoders) -> int:
        return 512

    def encode_prompts(self, prompts: list[str], encoders: TextEncoders) -> Conditioning:
        """Encode prompts. The pipeline returns the tokens of each alone; zeros fill them up to `MAX_TOKENS`."""
        embeds, _ = encoders.pipeline.encode_prompt(
            list(prompts),  # it writes its chat template into the list
            device=encoders.device,
            do_classifier_free_guidance=False,
            max_sequence_length=MAX_TOKENS,
        )
        padded = [functional.pad(tokens, (0, 0, 0, MAX_TOKENS - len(tokens))) for tokens in embeds]
        lengths = torch.tensor([len(tokens) for tokens in embeds], device=encoders.device)
        mask = torch.arange(MAX_TOKENS, device=encoders.device) < lengths[:, None]
        return Conditioning(torch.stack(padded), attention_mask=mask.long())

    def replacement(self, part: nn.Module) -> tuple[str, Any] | None:
        from diffusers.models.attention_processor import Attention
        from diffusers.models.transformers.transformer_z_image import ZSingleStreamAttnProcessor

        if isinstance(part, ZImageDenoiser):
            return "predict", MethodType(_predict_padded, part)
        if isinstance(part, Attention) and isinstance(part.processor, ZSingleStreamAttnProcessor):
            return "forward", MethodType(_attention, part)
        return None


def _predict_padded(
    self: ZImageDenoiser, latents: Tensor, timesteps: Tensor, condition: Tensor | None, prompt: Conditioning
) -> Tensor:
    """ZImageDenoiser.predict without lists: prompts of any length are one padded batch.

    Prompt and picture are each filled up to a multiple of `TOKEN_MULTIPLE` by a learned token. Here both get the most
    fill tokens that could be needed, and attention leaves out those beyond the multiple.
    """
    mask = require("attention_mask", prompt.attention_mask, "Z-Image")
    model = self.model
    size = f"{PATCH_SIZE}-1"
    rows, columns = (side // PATCH_SIZE for side in latents.shape[2:])
    with self._passed.during(condition):
        time = model.t_embedder((1000 - timesteps) / 1000 * model.t_scale).to(latents.dtype)

    lengths = mask.sum(dim=1)[:, None]
    texts, is_text, text_places = _filled(model.cap_embedder(prompt.prompt_embeds), lengths, model.cap_pad_token)
    filled_lengths = (lengths + TOKEN_MULTIPLE - 1) // TOKEN_MULTIPLE * TOKEN_MULTIPLE
    zeros = torch.zeros_like(text_places)
    text_rotary = _rotary(model.config, text_places + 1, zeros, zeros)
    for layer in model.context_refiner:
        texts = layer(texts, is_text, text_rotary)

    # A linear layer of patches is a convolution. torch.export cannot split an unknown side into pairs.
    embedder = model.all_x_embedder[size]
    kernel = embedder.weight.view(-1, PATCH_SIZE, PATCH_SIZE, self.latent_channels).permute(0, 3, 1, 2)
    patches = functional.conv2d(latents, kernel, embedder.bias, stride=PATCH_SIZE).flatten(2).transpose(1, 2)
    count = torch.full_like(lengths, rows * columns)
    pixels, is_pixel, pixel_places = _filled(patches, count, model.x_pad_token)
    is_real = pixel_places < count  # the places of fill tokens are 0
    down = pixel_places // columns
    across = pixel_places - down * columns
    pixel_rotary = _rotary(model.config, (filled_lengths + 1) * is_real, down * is_real, across * is_real)
    for layer in model.noise_refiner:
        pixels = layer(pixels, is_pixel, pixel_rotary, time)

    tokens = torch.cat([pixels, texts], dim=1)
    is_token, rotary = torch.cat([is_pixel, is_text], dim=1), torch.cat([pixel_rotary, text_rotary], dim=1)
    for layer in model.layers:
        tokens = layer(tokens, is_token, rotary, time)
    output: Tensor = model.all_final_layer[size](tokens[:, : rows * columns], c=time)
    output = output.reshape(-1, rows, columns, PATCH_SIZE, PATCH_SIZE, self.latent_channels)
    return -output.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def _filled(tokens: Tensor, lengths: Tensor, fill: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Replace tokens beyond `lengths` by the fill token and add the most that the multiple can need.

    Args:
        tokens: [B, N, D].
        lengths: number of real tokens of each sample, [B, 1].
        fill: [1, D].

    Returns:
        Tokens [B, N + 31, D]; whether attention reads each, [B, N + 31]; their places 0, 1, ..., [B, N + 31].
    """
    tokens = functional.pad(tokens, (0, 0, 0, TOKEN_MULTIPLE - 1))
    places = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape[0], -1)
    filled = torch.where((places < lengths)[..., None], tokens, fill)
    return filled, places // TOKEN_MULTIPLE * TOKEN_MULTIPLE < lengths, places


def _rotary(config: Any, *places: Tensor) -> Tensor:
    """Return cosines and sines [B, N, head_dim / 2, 2] of tokens at places [B, N]: of the frame, row and column."""
    angles = []
    for place, dim in zip(places, config.axes_dims, strict=True):
        frequencies = config.rope_theta ** -(torch.arange(0, dim, 2, dtype=torch.float64, device=place.device) / dim)
        angles.append(place[..., None] * frequencies.float())
    turn = torch.cat(angles, dim=-1)
    return torch.stack([turn.cos(), turn.sin()], dim=-1)


def _attention(self: Any, hidden_states: Tensor, attention_mask: Tensor, freqs_cis: Tensor) -> Tensor:
    """Attention.forward by ZSingleStreamAttnProcessor without complex numbers.

    Args:
        hidden_states: [B, N, D].
        attention_mask: whether each token is read, [B, N].
        freqs_cis: see `_rotary`.
    """
    query, key, value = (
        layer(hidden_states).unflatten(-1, (self.heads, -1)) for layer in (self.to_q, self.to_k, self.to_v)
    )
    if self.norm_q is not None:
        query, key = self.norm_q(query), self.norm_k(key)
    cosine, sine = freqs_cis[:, :, None].unbind(-1)

    def turned(x: Tensor) -> Tensor:
        real, imaginary = x.float()[..., 0::2], x.float()[..., 1::2]
        parts = [real * cosine - imaginary * sine, real * sine + imaginary * cosine]
        return torch.stack(parts, dim=-1).flatten(-2).to(x.dtype)

    query, key, value = (x.transpose(1, 2) for x in (turned(query), turned(key), value))
    mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask[:, None, None])
    output: Tensor = self.to_out[0](mixed.transpose(1, 2).flatten(2))
    return output
