"""Tiny denoiser of each family: the real class with random weights, the same on every call.

Each takes latents of `TINY_SHAPES` and the prompts of `tiny_conditioning`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNetMotionModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)
from torch import Tensor

from tdm_runtime.families import FAMILIES, Conditioning, denoiser_for

TEXT_DIM = 16
TEXT_TOKENS = 6
POOLED_DIM = 12
FLUX2_HIDDEN_DIM = 8
"""Width of the text encoder of FLUX.2, which gives three hidden states joined along the width."""


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


def tiny_flux(**changes: Any) -> FluxTransformer2DModel:
    """Return a transformer as in FLUX.1 [schnell], or in [dev] with `guidance_embeds=True`."""
    config = {
        "in_channels": 4 * 4,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 12,
        "num_attention_heads": 2,
        "joint_attention_dim": TEXT_DIM,
        "pooled_projection_dim": POOLED_DIM,
        "axes_dims_rope": (4, 4, 4),
    }
    return _seeded(FluxTransformer2DModel, config | changes)


def tiny_flux2(**changes: Any) -> Flux2Transformer2DModel:
    """Return a transformer as in FLUX.2 [klein]."""
    config = {
        "in_channels": 4 * 4,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 3 * FLUX2_HIDDEN_DIM,
        "axes_dims_rope": (4, 4, 4, 4),
        "guidance_embeds": False,
    }
    return _seeded(Flux2Transformer2DModel, config | changes)


def tiny_z_image(**changes: Any) -> ZImageTransformer2DModel:
    """Return a transformer as in Z-Image."""
    config = {
        "in_channels": 4,
        "dim": 16,
        "n_layers": 1,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": TEXT_DIM,
        "axes_dims": [4, 2, 2],
        "axes_lens": [1024, 128, 128],
    }
    return _seeded(ZImageTransformer2DModel, config | changes)


def tiny_sana(**changes: Any) -> SanaTransformer2DModel:
    """Return a transformer as in SANA-Sprint."""
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 2,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 8,
        "cross_attention_dim": 16,
        "caption_channels": TEXT_DIM,
        "sample_size": 8,
        "guidance_embeds": True,
        "qk_norm": "rms_norm_across_heads",
        "timestep_scale": 1000.0,
    }
    return _seeded(SanaTransformer2DModel, config | changes)


def tiny_wan(**changes: Any) -> WanTransformer3DModel:
    """Return a transformer as in Wan 2.1."""
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": TEXT_DIM,
        "freq_dim": 16,
        "ffn_dim": 16,
        "num_layers": 2,
        "rope_max_seq_len": 64,
    }
    return _seeded(WanTransformer3DModel, config | changes)


def tiny_motion_unet(**changes: Any) -> UNetMotionModel:
    """Return a UNet as in AnimateDiff."""
    config = {name: value for name, value in _UNET.items() if name != "attention_head_dim"}
    config |= {
        "down_block_types": ("DownBlockMotion", "CrossAttnDownBlockMotion"),
        "up_block_types": ("CrossAttnUpBlockMotion", "UpBlockMotion"),
        "block_out_channels": (16, 24),
        "num_attention_heads": 2,
        "motion_num_attention_heads": 2,
        "motion_max_seq_length": 24,
    }
    return _seeded(UNetMotionModel, config | changes)


TINY_MODELS: Mapping[str, Callable[..., Any]] = {
    "stable_diffusion": tiny_unet,
    "sdxl": tiny_sdxl_unet,
    "pixart": tiny_pixart,
    "sd3": tiny_sd3,
    "flux": tiny_flux,
    "flux2": tiny_flux2,
    "cogvideox": tiny_cogvideox,
    "z_image": tiny_z_image,
    "sana": tiny_sana,
    "wan": tiny_wan,
    "animatediff": tiny_motion_unet,
}
"""Family -> tiny denoiser. A test fails if a registered family is missing here."""
TINY_SHAPES: Mapping[str, tuple[int, ...]] = {
    name: (4, 3, 8, 8) if FAMILIES[name].makes_clips else (4, 8, 8) for name in TINY_MODELS
} | {"flux2": (16, 4, 4)}
"""Family -> latents of one sample."""


def call_sd(unet: Any, x: Tensor, timesteps: Tensor, prompt: Conditioning) -> Tensor:
    output: Tensor = unet(x, timesteps, prompt.prompt_embeds).sample
    return output


def call_sdxl(unet: Any, x: Tensor, timesteps: Tensor, prompt: Conditioning) -> Tensor:
    added = {"text_embeds": prompt.pooled_prompt_embeds, "time_ids": prompt.time_ids}
    output: Tensor = unet(x, timesteps, prompt.prompt_embeds, added_cond_kwargs=added).sample
    return output


def call_pixart(transformer: Any, x: Tensor, timesteps: Tensor, prompt: Conditioning) -> Tensor:
    sizes = {"resolution": None, "aspect_ratio": None}
    output = transformer(x, prompt.prompt_embeds, timesteps, sizes, encoder_attention_mask=prompt.attention_mask)
    predicted, _variance = output.sample.chunk(2, dim=1)
    return predicted


def call_sd3(transformer: Any, x: Tensor, timesteps: Tensor, prompt: Conditioning) -> Tensor:
    output: Tensor = transformer(x, prompt.prompt_embeds, prompt.pooled_prompt_embeds, timesteps).sample
    return output


def call_flux(transformer: Any, x: Tensor, timesteps: Tensor, prompt: Conditioning) -> Tensor:
    batch, channels, height, width = x.shape
    output = transformer(
        FluxPipeline._pack_latents(x, batch, channels, height, width),
        prompt.prompt_embeds,
        prompt.pooled_prompt_embeds,
        timesteps / 1000,
        FluxPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, x.device, x.dtype),
        torch.zeros(prompt.prompt_embeds.shape[1], 3),
        prompt.guidance,
    ).sample
    return FluxPipeline._unpack_latents(output, 8 * height, 8 * width, 8)


def call_flux2(transformer: Any, x: Tensor, timesteps: Tensor, prompt: Conditioning) -> Tensor:
    output = transformer(
        Flux2KleinPipeline._pack_latents(x),
        prompt.prompt_embeds,
        timesteps / 1000,
        Flux2KleinPipeline._prepare_latent_ids(x),
        Flux2KleinPipeline._prepare_text_ids(prompt.prompt_embeds),
    ).sample
    return output.transpose(1, 2).reshape(x.shape)


def call_cogvideox(transformer: Any, x: Tensor, timesteps: Tensor, prompt: Conditioning) -> Tensor:
    output: Tensor = transformer(x.transpose(1, 2).contiguous(), prompt.prompt_embeds, timesteps).sample
    return output.transpose(1, 2)


def call_z_image(transformer: Any, x: Tensor, timesteps: Tensor, prompt: Conditioning) -> Tensor:
    assert prompt.attention_mask is not None
    captions = [embeds[mask == 1] for embeds, mask in zip(prompt.prompt_embeds, prompt.attention_mask, strict=True)]
    output = transformer(list(x.unsqueeze(2)), (1000 - timesteps) / 1000, captions).sample
    return -torch.stack(output).squeeze(2)


def call_sana(transformer: Any, x: Tensor, timesteps: Tensor, prompt: Conditioning) -> Tensor:
    assert prompt.guidance is not None
    scm = torch.sin(timesteps) / (torch.cos(timesteps) + torch.sin(timesteps))
    s = scm.view(-1, 1, 1, 1)
    model_input = x * torch.sqrt(s**2 + (1 - s) ** 2)
    output = transformer(
        model_input,
        encoder_hidden_states=prompt.prompt_embeds,
        encoder_attention_mask=prompt.attention_mask,
        guidance=prompt.guidance * transformer.config.guidance_embeds_scale,
        timestep=scm,
    ).sample
    mixed: Tensor = (1 - 2 * s) * model_input + (1 - 2 * s + 2 * s**2) * output
    return mixed / torch.sqrt(s**2 + (1 - s) ** 2)


def call_wan(transformer: Any, x: Tensor, timesteps: Tensor, prompt: Conditioning) -> Tensor:
    output: Tensor = transformer(x, timesteps, prompt.prompt_embeds).sample
    return output


def call_animatediff(unet: Any, x: Tensor, timesteps: Tensor, prompt: Conditioning) -> Tensor:
    output: Tensor = unet(x, timesteps, prompt.prompt_embeds.repeat_interleave(x.shape[2], dim=0)).sample
    return output


STOCK_CALLS: Mapping[str, Callable[[Any, Tensor, Tensor, Conditioning], Tensor]] = {
    "stable_diffusion": call_sd,
    "sdxl": call_sdxl,
    "pixart": call_pixart,
    "sd3": call_sd3,
    "flux": call_flux,
    "flux2": call_flux2,
    "cogvideox": call_cogvideox,
    "z_image": call_z_image,
    "sana": call_sana,
    "wan": call_wan,
    "animatediff": call_animatediff,
}
"""Family -> call of the bare model as its diffusers pipeline makes it, with an output shaped as the latents."""


def tiny_conditioning(family: str, batch_size: int, seed: int = 0) -> Conditioning:
    """Random prompts with every field that the family reads."""
    draw = torch.Generator().manual_seed(seed)
    fields = _conditioning_inputs(family)
    embeds = torch.randn(batch_size, TEXT_TOKENS, fields["prompt_embeds"][-1], generator=draw)
    pooled = mask = time_ids = guidance = None
    if "pooled_prompt_embeds" in fields:
        pooled = torch.randn(batch_size, POOLED_DIM, generator=draw)
    if "attention_mask" in fields:
        lengths = torch.randint(1, TEXT_TOKENS + 1, (batch_size, 1), generator=draw)
        mask = (torch.arange(TEXT_TOKENS) < lengths).long()
    if "time_ids" in fields:
        time_ids = torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]]).repeat(batch_size, 1)
    if "guidance" in fields:
        guidance = 1 + 4 * torch.rand(batch_size, generator=draw)
    return Conditioning(embeds, pooled, mask, time_ids, guidance)


@cache
def _conditioning_inputs(family: str) -> Mapping[str, tuple[Any, ...]]:
    """Return the shapes of the denoiser's inputs by name."""
    interface = denoiser_for(TINY_MODELS[family]()).interface(TEXT_TOKENS)
    return {spec.name: spec.shape for spec in interface.inputs}


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
