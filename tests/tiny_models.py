"""Real denoiser classes at a tiny size, with random weights that are the same on every call.

Each takes latents of `TINY_SHAPES` and prompt embeddings [B, L, `TEXT_DIM`].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)

from tdm_runtime.families.conditioning import Conditioning

TEXT_DIM = 16
TEXT_TOKENS = 6
POOLED_DIM = 12


def tiny_unet(**changes: Any) -> UNet2DConditionModel:
    """Return a UNet as in Stable Diffusion 1.5."""
    return _seeded(UNet2DConditionModel, _UNET | changes)


def tiny_sdxl_unet(**changes: Any) -> UNet2DConditionModel:
    """Return a UNet as in SDXL, which also reads pooled embeddings and the size of the picture."""
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": POOLED_DIM + 6 * 4,
        "use_linear_projection": True,
    }
    return _seeded(UNet2DConditionModel, _UNET | added | changes)


def tiny_pixart(**changes: Any) -> PixArtTransformer2DModel:
    """Return a transformer as in PixArt-alpha 512, or in 1024 with `use_additional_conditions=True`."""
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,  # the size conditions share the width by three
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "cross_attention_dim": 24,
        "caption_channels": TEXT_DIM,
        "sample_size": 8,
        "use_additional_conditions": False,
    }
    return _seeded(PixArtTransformer2DModel, config | changes)


def tiny_sd3(**changes: Any) -> SD3Transformer2DModel:
    """Return a transformer as in Stable Diffusion 3."""
    config = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": TEXT_DIM,
        "caption_projection_dim": 16,
        "pooled_projection_dim": POOLED_DIM,
        "pos_embed_max_size": 16,
    }
    return _seeded(SD3Transformer2DModel, config | changes)


def tiny_cogvideox(**changes: Any) -> CogVideoXTransformer3DModel:
    """Return a transformer as in CogVideoX-2b, or in 5b with `use_rotary_positional_embeddings=True`."""
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 16,
        "text_embed_dim": TEXT_DIM,
        "num_layers": 2,
        "sample_width": 8,
        "sample_height": 8,
        "sample_frames": 9,
        "max_text_seq_length": TEXT_TOKENS,
    }
    return _seeded(CogVideoXTransformer3DModel, config | changes)


TINY_MODELS: Mapping[str, Callable[..., Any]] = {
    "sd": tiny_unet,
    "sdxl": tiny_sdxl_unet,
    "pixart": tiny_pixart,
    "sd3": tiny_sd3,
    "cogvideox": tiny_cogvideox,
}
TINY_SHAPES: Mapping[str, tuple[int, ...]] = {
    "sd": (4, 8, 8),
    "sdxl": (4, 8, 8),
    "pixart": (4, 8, 8),
    "sd3": (4, 8, 8),
    "cogvideox": (4, 3, 8, 8),
}
"""Latents of one sample."""


def tiny_conditioning(family: str, batch_size: int, seed: int = 0) -> Conditioning:
    """Random prompts with all that the family reads."""
    draw = torch.Generator().manual_seed(seed)
    embeds = torch.randn(batch_size, TEXT_TOKENS, TEXT_DIM, generator=draw)
    pooled = torch.randn(batch_size, POOLED_DIM, generator=draw) if family in ("sdxl", "sd3") else None
    mask = None
    if family == "pixart":
        lengths = torch.randint(1, TEXT_TOKENS + 1, (batch_size, 1), generator=draw)
        mask = (torch.arange(TEXT_TOKENS) < lengths).long()
    time_ids = torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]]).repeat(batch_size, 1) if family == "sdxl" else None
    return Conditioning(embeds, pooled, mask, time_ids)


_UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": TEXT_DIM,
    "attention_head_dim": 2,
    "norm_num_groups": 8,
}


def _seeded(model_class: Any, config: Mapping[str, Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(**config).eval()
        # diffusers starts output layers and gates near zero. Here every part must change the output.
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return model
