"""The clip denoiser: the embedded picture UNet with motion modules that know the frame number from the start.

The stock motion modules learn slowly from few clips: their attention begins nearly uniform over the frames, so the
frame number, which enters only as its input, hardly reaches the other layers. Here the first attention of each
module begins as "each frame reads itself", by its position, and passes the position on. So the feed-forward layer
combines frame number and motion words from the first iteration. All of this is weights and buffers of the stock
class; its code is unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import MotionAdapter, UNet2DConditionModel, UNetMotionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.embeddings import SinusoidalPositionalEmbedding
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from torch import Tensor, nn

MAX_FRAMES = 16
"""Frames that the position code distinguishes."""
WAVELENGTHS = (4.0, 4.0 * MAX_FRAMES)
"""Shortest and longest wavelength of the position code, in frames."""
POSITION_SCALE = 1.5
"""Amplitude of the position code. Content has the root mean square `CONTENT_SCALE`."""
CONTENT_SCALE = 0.5
SHARPNESS = 1.5
"""Scale of queries and keys of the first attention. A frame gives itself about nine tenths of its attention."""
PASS_ON = 2.0
"""Factor on the first attention's output, so that the position stands out beside the content."""
OUTPUT_SCALE = 0.2
"""Factor on a module's output. Small, so that the picture model survives; not zero, so that all layers learn."""
_HEAD_DIM = 32


def build_motion_unet(picture_unet: UNet2DConditionModel) -> UNetMotionModel:
    """Return the clip denoiser grown from a picture UNet. Motion modules draw from torch's random numbers.

    It also takes over the projection of K, so the student need not learn K anew.
    """
    channels: Sequence[int] = picture_unet.config.block_out_channels
    adapter = MotionAdapter(
        block_out_channels=tuple(channels),
        motion_layers_per_block=picture_unet.config.layers_per_block,
        motion_num_attention_heads=tuple(c // _HEAD_DIM for c in channels),
        motion_norm_num_groups=picture_unet.config.norm_num_groups,
        motion_max_seq_length=MAX_FRAMES,
    )
    unet = UNetMotionModel.from_unet2d(picture_unet, adapter)
    for module in motion_modules(unet):
        _reveal_frame_number(module)
    return for_training(unet)


def load_motion_unet(folder: Path) -> UNetMotionModel:
    """Load a clip denoiser in float32, with the attention that trains fastest on a CPU."""
    return for_training(UNetMotionModel.from_pretrained(folder).float())


def for_training(unet: UNetMotionModel) -> UNetMotionModel:
    """Give a denoiser the plain attention processor, whose backward pass is faster than SDPA's on a CPU."""
    unet.set_attn_processor(AttnProcessor())
    return unet


def motion_modules(unet: nn.Module) -> list[AnimateDiffTransformer3D]:
    """Return the motion modules of a denoiser."""
    return [module for module in unet.modules() if isinstance(module, AnimateDiffTransformer3D)]


def motion_parameters(unet: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of the motion modules."""
    return [p for module in motion_modules(unet) for p in module.parameters()]


@torch.no_grad()
def _reveal_frame_number(module: AnimateDiffTransformer3D) -> None:
    for block in module.transformer_blocks:
        assert isinstance(block, BasicTransformerBlock)
        code = position_code(block.dim, block.num_attention_heads, MAX_FRAMES)
        block.pos_embed.pe.copy_(code)
        block.norm1.weight.fill_(CONTENT_SCALE)
        block.norm2.weight.fill_(CONTENT_SCALE)
        for projection in (block.attn1.to_q, block.attn1.to_k):
            projection.weight.copy_(SHARPNESS * torch.eye(block.dim))
        block.attn1.to_out[0].weight.mul_(PASS_ON)
    module.proj_out.weight.mul_(OUTPUT_SCALE)
    module.proj_out.bias.zero_()


def position_code(dim: int, heads: int, frames: int) -> Tensor:
    """Return sines and cosines of frame numbers, [1, F, D].

    Wavelengths lie evenly (in their logarithms) between `WAVELENGTHS`, and each head has a share of all of them.
    The stock code's wavelengths reach 60,000 frames, and most of its dimensions are constant over a short clip.
    """
    pairs = dim // 2
    shortest, longest = (math.log(w) for w in WAVELENGTHS)
    order = torch.arange(pairs).reshape(pairs // heads, heads).T.flatten()
    wavelengths = torch.exp(shortest + (longest - shortest) * order / max(1, pairs - 1))
    angles = torch.arange(frames).unsqueeze(1) * (2.0 * math.pi / wavelengths)
    return POSITION_SCALE * torch.stack([angles.sin(), angles.cos()], dim=-1).reshape(1, frames, dim)


@contextmanager
def frames_shown(unet: nn.Module, frames: Sequence[int]) -> Iterator[None]:
    """Let a denoiser take clips of only these frames, at their true positions, for the time of the block.

    Iterations on some of the frames are cheaper, and motion shows in few frames already.
    """
    codes = [module for module in unet.modules() if isinstance(module, SinusoidalPositionalEmbedding)]
    whole = [code.pe for code in codes]
    for code, pe in zip(codes, whole, strict=True):
        code.pe = pe[:, list(frames)]
    try:
        yield
    finally:
        for code, pe in zip(codes, whole, strict=True):
            code.pe = pe
