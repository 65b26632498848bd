"""What each family needs to be exported: its interface, and forwards that torch.export can follow.

The models compute some things in Python from the sizes of their inputs (positional embeddings, crops).
torch.export would write the numbers of the traced size into the graph as constants, or stop. `traceable`
swaps such methods, for the time of an export, for ones that compute the same in tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tdm_runtime.families.cogvideox import CogVideoXDenoiser

if TYPE_CHECKING:
    pass

_ALWAYS_PASS_SIZES = 30
"""Of upsamplers: a UNet doubles sizes that are multiples of 2**upsamplers and looks up all others. Traced with such
a multiple it would fail at the others, so it is told that it has more upsamplers than any size has factors."""


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """ATen operators that are written otherwise than the exporter would."""
    from onnxscript import opset20 as op

    def squeeze(tensor: Any, dim: int) -> Any:
        """PixArt squeezes its tokens, which are more than one: torch lets that pass, ONNX does not."""
        return op.Squeeze(tensor, op.Constant(value_ints=[dim])) if tensor.shape[dim] == 1 else op.Identity(tensor)

    return {torch.ops.aten.squeeze.dim: squeeze}


@contextmanager
def traceable(module: nn.Module) -> Iterator[None]:
    """Within the block the methods that torch.export cannot follow are replaced by ones with the same results."""
    with ExitStack() as stack:
        for part in module.modules():
            if (swap := _swap(part)) is not None:
                stack.enter_context(_replaced(part, *swap))
        yield


def _swap(part: nn.Module) -> tuple[str, Any] | None:
    """What of a module is swapped, and what for."""
    from diffusers import UNet2DConditionModel
    from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXSafeConv3d
    from diffusers.models.embeddings import CogVideoXPatchEmbed, PatchEmbed

    if isinstance(part, UNet2DConditionModel):
        return "num_upsamplers", _ALWAYS_PASS_SIZES
    if isinstance(part, PatchEmbed) and part.pos_embed is not None and part.pos_embed_max_size is None:
        return "forward", MethodType(_embed_patches, part)
    if isinstance(part, CogVideoXPatchEmbed) and part.use_positional_embeddings:
        return "_get_positional_embeddings", MethodType(_joint_position_embedding, part)
    if isinstance(part, CogVideoXDenoiser) and part.model.config.use_rotary_positional_embeddings:
        return "_rotary_embedding", MethodType(_rotary_embedding, part)
    if isinstance(part, CogVideoXSafeConv3d):
        return "forward", MethodType(
            nn.Conv3d.forward, part
        )  # it asks how large its input is and splits a large one: same result
    return None


@contextmanager
def _replaced(part: nn.Module, name: str, value: Any) -> Iterator[None]:
    """One instance's method or number, replaced."""
    own = {key: part.__dict__[key] for key in [name] if key in part.__dict__}
    part.__dict__[name] = value
    try:
        yield
    finally:
        del part.__dict__[name]
        part.__dict__.update(own)


def _embed_patches(self: Any, latent: Tensor) -> Tensor:
    """PatchEmbed.forward with 2D sines and cosines of the size at hand; diffusers bakes in the traced one's."""
    patches = self.proj(latent)
    tokens = patches.flatten(2).transpose(1, 2)
    if self.norm is not None:
        tokens = self.norm(tokens)

    def positions(size: int) -> Tensor:
        """The grid of any size is stretched over the grid that the model was trained on."""
        counted = torch.arange(size, dtype=torch.float32)
        base_size, scale = float(self.base_size), float(self.interpolation_scale)
        return counted / (_length(counted) / base_size) / scale

    rows, columns = (positions(size) for size in patches.shape[-2:])
    embedded: Tensor = (tokens + _sines_2d(rows, columns, self.pos_embed.shape[-1])[None]).to(tokens.dtype)
    return embedded


def _joint_position_embedding(self: Any, height: int, width: int, num_frames: int, device: object = None) -> Tensor:
    """CogVideoXPatchEmbed._get_positional_embeddings [1, L + F * H * W / 4, D], zeros for the text; all on the CPU."""
    spatial_dim, temporal_dim = 3 * self.embed_dim // 4, self.embed_dim // 4
    frames = (num_frames - 1) // self.temporal_compression_ratio + 1
    rows, columns, times = (
        torch.arange(size, dtype=torch.float32) / scale
        for size, scale in (
            (height // self.patch_size, self.spatial_interpolation_scale),
            (width // self.patch_size, self.spatial_interpolation_scale),
            (frames, self.temporal_interpolation_scale),
        )
    )
    spatial = _sines_2d(rows, columns, spatial_dim)[None].expand(frames, -1, -1)
    temporal = _sines_1d(times, temporal_dim)[:, None].expand(-1, spatial.shape[1], -1)
    video = torch.cat([temporal, spatial], dim=-1).flatten(0, 1)
    return torch.cat([torch.zeros(self.max_text_seq_length, self.embed_dim), video])[None]


def _rotary_embedding(self: CogVideoXDenoiser, latents: Tensor) -> tuple[Tensor, Tensor]:
    """CogVideoXDenoiser._rotary_embedding, in tensors: [F * H * W / patches, attention_head_dim] each."""
    config = self.model.config
    frames, height, width = latents.shape[2:]
    counted = [
        torch.arange(size, dtype=torch.float64)
        for size in (frames // self.patch_size_t, height // self.patch_size, width // self.patch_size)
    ]
    times, rows, columns = counted
    if config.patch_size_t is None:
        trained = (config.sample_height // self.patch_size, config.sample_width // self.patch_size)
        (top, bottom), (left, right) = _crop_region(_length(rows), _length(columns), *trained)
        rows = _evenly_spaced(rows, top, bottom)
        columns = _evenly_spaced(columns, left, right)
    head_dim = config.attention_head_dim
    axes = ((times, head_dim // 4), (rows, head_dim // 8 * 3), (columns, head_dim // 8 * 3))
    shape = tuple(axis.shape[0] for axis in counted)

    def table(wave: Callable[[Tensor], Tensor]) -> Tensor:
        parts = []
        for index, (positions, dim) in enumerate(axes):
            waves = wave(positions.float()[:, None] * _rotary_frequencies(dim)).repeat_interleave(2, dim=1)
            view = [1, 1, 1, dim]
            view[index] = -1
            parts.append(waves.view(view).expand(*shape, dim))
        return torch.cat(parts, dim=-1).flatten(0, 2)

    return table(torch.cos), table(torch.sin)


def _crop_region(
    height: Tensor, width: Tensor, trained_height: int, trained_width: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """diffusers' get_resize_crop_region_for_grid, without its branches. float64, as Python's: halves decide.

    Returns:
        (top, bottom), (left, right).
    """
    is_tall = height / width > trained_height / trained_width
    resized_height = torch.where(is_tall, float(trained_height), torch.round(trained_width / width * height))
    resized_width = torch.where(is_tall, torch.round(trained_height / height * width), float(trained_width))
    top = torch.round((trained_height - resized_height) / 2)
    left = torch.round((trained_width - resized_width) / 2)
    return (top, top + resized_height), (left, left + resized_width)


def _evenly_spaced(counted: Tensor, start: Tensor, stop: Tensor) -> Tensor:
    """linspace(start, stop * (n - 1) / n, n) for counted = 0 ... n - 1."""
    length = _length(counted)
    last = stop * (length - 1) / length
    return start + counted * ((last - start) / (length - 1).clamp(min=1))


def _length(counted: Tensor) -> Tensor:
    """n as a tensor, for 0 ... n - 1: sizes themselves would be traced as Python numbers."""
    return counted[-1] + 1


def _sines_2d(rows: Tensor, columns: Tensor, dim: int) -> Tensor:
    """Return [H * W, dim]: half for the columns, as diffusers has it, then half for the rows."""
    across = _sines_1d(columns, dim // 2)[None].expand(rows.shape[0], -1, -1)
    down = _sines_1d(rows, dim // 2)[:, None].expand(-1, columns.shape[0], -1)
    return torch.cat([across, down], dim=-1).flatten(0, 1)


def _sines_1d(positions: Tensor, dim: int) -> Tensor:
    """Return [N, dim]: sines, then cosines."""
    omega = torch.arange(dim // 2, dtype=torch.float64) / (dim / 2)
    angles = positions[:, None] * (1.0 / 10000**omega).float()
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _rotary_frequencies(dim: int) -> Tensor:
    return 1.0 / 10000 ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
