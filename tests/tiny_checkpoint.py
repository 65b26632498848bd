"""Checkpoint of the real classes at minimal size. Its random weights are the same on every call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tdm_runtime.checkpoint.folder import DEFAULT_CHECKPOINT
from training.emoji.stages.publish import write_checkpoint
from training.emoji.stages.student import build_recipe


def write_tiny_checkpoint(folder: Path, sizes: Sequence[tuple[int, int]] = ((16, 16), (24, 16))) -> Path:
    """Write a checkpoint for pictures of some sizes, in pixels, with DPM-Solver++ 2M. Returns its folder."""
    tokenizer = CLIPTokenizer.from_pretrained(DEFAULT_CHECKPOINT / "tokenizer")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=2,
            cross_attention_dim=16,
            time_cond_proj_dim=8,
        )
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            latent_channels=4,
        )
        text_model = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=tokenizer.model_max_length,
                eos_token_id=tokenizer.eos_token_id,
            )
        )
        tiny_vae = AutoencoderTiny(
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        )
    recipe = replace(build_recipe(), solver="dpmsolver++", native_sizes=tuple(sizes))
    write_checkpoint(folder, recipe, unet, vae, text_model, tokenizer, tiny_vae=tiny_vae)
    return folder
