"""Published architectures as data, and models of them with random weights, to try exports and plan training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class RealSize:
    """One component of a published model."""

    model_class: str
    """Name of a class of diffusers, or of a CLIP of transformers."""
    config: Mapping[str, Any]
    sizes: Mapping[str, int]
    """Sizes in latents of the call that is timed, as published."""
    tokens: int = 0
    """L of the prompt embeddings that a denoiser reads; 0 for other components."""
    note: str = ""
    """How `sizes` differ from the published ones; empty if they do not."""
    part: str = ""
    """Name of a `PartKind`, for decoders of clips."""

    @property
    def small(self) -> Mapping[str, int]:
        """Sizes small enough to run in torch too; batch, height and width differ from the traced ones."""
        return {**self.sizes, "batch": 3, "height": 10, "width": 16}


def _clip_large() -> dict[str, Any]:
    return {
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 77,
        "projection_dim": 768,
        "hidden_act": "quick_gelu",
        "bos_token_id": 0,  # as the embedded checkpoint's tokenizer has them
        "eos_token_id": 1,
        "pad_token_id": 1,
    }


def _clip_big_g() -> dict[str, Any]:
    return _clip_large() | {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "projection_dim": 1280,
        "hidden_act": "gelu",
    }


def _autoencoder_kl(scaling_factor: float, sample_size: int) -> dict[str, Any]:
    return {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "latent_channels": 4,
        "norm_num_groups": 32,
        "sample_size": sample_size,
        "scaling_factor": scaling_factor,
    }


_SD15_UNET = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "time_cond_proj_dim": 256,
}

_SDXL_UNET = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "time_cond_proj_dim": 256,
}

_SD3_MEDIUM = {
    "sample_size": 128,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}

_SD3_VAE = {
    "latent_channels": 16,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}

_PIXART = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "cross_attention_dim": 1152,
    "caption_channels": 4096,
    "sample_size": 64,
    "use_additional_conditions": False,
}

_COGVIDEOX_2B = {
    "num_attention_heads": 30,
    "attention_head_dim": 64,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 30,
    "text_embed_dim": 4096,
    "time_embed_dim": 512,
    "max_text_seq_length": 226,
    "sample_width": 90,
    "sample_height": 60,
    "sample_frames": 49,
}

_COGVIDEOX_VAE = {
    "down_block_types": ("CogVideoXDownBlock3D",) * 4,
    "up_block_types": ("CogVideoXUpBlock3D",) * 4,
    "block_out_channels": (128, 256, 256, 512),
    "layers_per_block": 3,
    "latent_channels": 16,
    "sample_height": 480,
    "sample_width": 720,
    "scaling_factor": 1.15258426,
}

_WAN_1_3B = {
    "num_attention_heads": 12,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 8960,
    "num_layers": 30,
}

_SANA_SPRINT = {
    "in_channels": 32,
    "out_channels": 32,
    "num_layers": 28,
    "num_attention_heads": 36,
    "attention_head_dim": 32,
    "num_cross_attention_heads": 16,
    "cross_attention_head_dim": 72,
    "cross_attention_dim": 1152,
    "caption_channels": 2304,
    "mlp_ratio": 2.5,
    "sample_size": 32,
    "guidance_embeds": True,
    "qk_norm": "rms_norm_across_heads",
    "timestep_scale": 1000.0,
}

_FLUX2_KLEIN_4B = {
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "guidance_embeds": False,
}
_LATENTS_512 = {"batch": 1, "height": 64, "width": 64}
_LATENTS_1024 = {"batch": 1, "height": 128, "width": 128}
_LATENTS_VIDEO = {"batch": 1, "frames": 13, "height": 60, "width": 90}
_TILE = {"batch": 1, "frames": 13, "height": 26, "width": 26}
_TILE_480P = {"batch": 1, "frames": 21, "height": 45, "width": 45}
"""Tiles of a clip's decode on a CPU (`MAX_COMPILED_PART_PIXELS`)."""
_LATENTS_480P = {"batch": 1, "frames": 21, "height": 60, "width": 104}
_LATENTS_480P_CUT = {**_LATENTS_480P, "frames": 5}

REAL_SIZES: Mapping[str, Mapping[str, RealSize]] = {
    "sd15": {
        "text_encoder": RealSize("CLIPTextModel", _clip_large(), {"batch": 1}),
        "denoiser": RealSize("UNet2DConditionModel", _SD15_UNET, _LATENTS_512, 77),
        "decoder": RealSize("AutoencoderKL", _autoencoder_kl(0.18215, 512), _LATENTS_512),
        "tiny_decoder": RealSize("AutoencoderTiny", {}, _LATENTS_512),
    },
    "pixart": {
        "denoiser": RealSize("PixArtTransformer2DModel", _PIXART, _LATENTS_512, 120),
        "decoder": RealSize("AutoencoderKL", _autoencoder_kl(0.18215, 512), _LATENTS_512),
    },
    "sdxl": {
        "denoiser": RealSize("UNet2DConditionModel", _SDXL_UNET, _LATENTS_1024, 77),
        "decoder": RealSize("AutoencoderKL", _autoencoder_kl(0.13025, 1024), _LATENTS_1024),
    },
    "sd3": {
        "denoiser": RealSize("SD3Transformer2DModel", _SD3_MEDIUM, _LATENTS_512, 333),
        "decoder": RealSize("AutoencoderKL", _autoencoder_kl(1.5305, 1024) | _SD3_VAE, _LATENTS_512),
    },
    "sana": {
        "denoiser": RealSize("SanaTransformer2DModel", _SANA_SPRINT, {"batch": 1, "height": 32, "width": 32}, 300)
    },
    "cogvideox-2b": {
        "denoiser": RealSize("CogVideoXTransformer3DModel", _COGVIDEOX_2B, _LATENTS_VIDEO, 226),
        "decoder_first_3": RealSize(
            "AutoencoderKLCogVideoX", _COGVIDEOX_VAE, _TILE, note="9 of 49 frames, a tile", part="first_3"
        ),
        "decoder_later_2": RealSize(
            "AutoencoderKLCogVideoX", _COGVIDEOX_VAE, _TILE, note="8 of 49 frames, a tile", part="later_2"
        ),
    },
    "wan-1.3b": {
        "denoiser": RealSize("WanTransformer3DModel", _WAN_1_3B, _LATENTS_480P_CUT, 512, note="17 of 81 frames"),
        "decoder_first_1": RealSize("AutoencoderKLWan", {}, _LATENTS_480P, note="1 of 81 frames", part="first_1"),
        "decoder_later_1": RealSize("AutoencoderKLWan", {}, _TILE_480P, note="4 of 81 frames, a tile", part="later_1"),
    },
}
"""Model -> program (`program_names`). PixArt is the model of 512 pixels, SANA is Sprint 0.6B.

Text encoders that only torch runs are in `STOCK_TEXT`.
"""

_TEXT = {"batch": 1}

STOCK_TEXT: Mapping[str, Mapping[str, RealSize]] = {
    "sdxl": {
        "text_encoder": RealSize("CLIPTextModel", _clip_large(), _TEXT),
        "text_encoder_2": RealSize("CLIPTextModelWithProjection", _clip_big_g(), _TEXT),
    },
    "sd3": {
        "text_encoder": RealSize("CLIPTextModelWithProjection", _clip_large(), _TEXT),
        "text_encoder_2": RealSize("CLIPTextModelWithProjection", _clip_big_g(), _TEXT),
    },
}
"""Model -> folder -> text encoder that runs in its stock pipeline. SD3 comes without its T5."""


TEACHERS: Mapping[str, RealSize] = {
    "flux-dev": RealSize("FluxTransformer2DModel", {"guidance_embeds": True}, _LATENTS_1024, 512),
    "flux2-klein-base-4b": RealSize("Flux2Transformer2DModel", _FLUX2_KLEIN_4B, _LATENTS_1024, 512),
    "z-image": RealSize("ZImageTransformer2DModel", {}, _LATENTS_1024, 512),
}
"""Denoisers that are too large to be exported on a usual machine; training plans their memory. FLUX.1 and Z-Image are
their classes' own defaults."""


def random_model(component: RealSize, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Build a component with random weights that keep activations near 1; eval mode.

    The libraries' own random initialisation is skipped: it takes minutes for billions of weights.
    """
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = empty_model(component)
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            drawn = _random_weight(parameter, is_scale=name == "weight", generator=generator)
            setattr(module, name, nn.Parameter(drawn.to(dtype), requires_grad=False))
    return model.eval()


def empty_model(component: RealSize) -> nn.Module:
    """Build a component with the initial weights of its library."""
    model: nn.Module
    if component.model_class.startswith("CLIPText"):
        import transformers

        model = getattr(transformers, component.model_class)(transformers.CLIPTextConfig(**component.config))
    else:
        import diffusers

        model = getattr(diffusers, component.model_class)(**component.config)
    return model


def _random_weight(like: Tensor, *, is_scale: bool, generator: torch.Generator) -> Tensor:
    """Return normal matrices and kernels with variance 1 / fan_in; scales are one and biases zero."""
    if like.ndim > 1:
        return torch.empty(like.shape).normal_(std=1 / math.sqrt(like[0].numel()), generator=generator)
    return torch.ones(like.shape) if is_scale else torch.zeros(like.shape)
