"""CogVideoX, text to video: a T5 text encoder, CogVideoXTransformer3DModel and a VAE of clips."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import reduce
from operator import getitem
from types import MethodType
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from tdm_runtime.backends.interface import Interface
from tdm_runtime.errors import CheckpointError
from tdm_runtime.families.conditioning import Conditioning
from tdm_runtime.families.denoiser import Denoiser, require_outputs
from tdm_runtime.families.family import Family, NativeClip, TextEncoders
from tdm_runtime.families.latent_space import Cache, ClipDecoderModule, LatentGeometry, PartKind
from tdm_runtime.families.positions import length, sines_1d, sines_2d

if TYPE_CHECKING:
    from diffusers import CogVideoXTransformer3DModel


class CogVideoXDenoiser(Denoiser):
    """K goes in by the transformer's own `timestep_cond`. Its frames come before its channels, ours after."""

    timestep_embedding_name = "time_embedding"
    text_dim_name = "text_embed_dim"
    latent_axes = ("frames", "height", "width")

    def __init__(self, model: CogVideoXTransformer3DModel) -> None:
        super().__init__(model)
        require_outputs(model, (self.latent_channels,))
        self.patch_size_t: int = model.config.patch_size_t or 1
        """Latent frames per token; the number of latent frames is a multiple of it."""

    def interface(self, tokens: int | str) -> Interface:
        """Return what `forward` is called with.

        Raises:
            CheckpointError: the model reads a fixed number of tokens, and another one was given.
        """
        if self.fixed_tokens not in (None, tokens):
            raise CheckpointError(
                f"tokens is {tokens!r}; without rotary embeddings CogVideoX reads exactly {self.fixed_tokens}"
            )
        return super().interface(tokens)

    @property
    def fixed_tokens(self) -> int | None:
        config = self.model.config
        return None if config.use_rotary_positional_embeddings else int(config.max_text_seq_length)

    def predict(self, latents: Tensor, timesteps: Tensor, condition: Tensor | None, prompt: Conditioning) -> Tensor:
        """Call the transformer with latents [B, C, F, H, W]; attention_mask is unread, as in stock pipelines.

        Without rotary embeddings prompt_embeds must be exactly `max_text_seq_length` tokens long.
        """
        output: Tensor = self.model(
            latents.transpose(1, 2),
            prompt.prompt_embeds,
            timesteps,
            timestep_cond=condition,
            image_rotary_emb=self._rotary_embedding(latents),
            return_dict=False,
        )[0]
        return output.transpose(1, 2)

    def _rotary_embedding(self, latents: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return cosines and sines [F * H * W / patches, attention_head_dim], as `CogVideoXPipeline` makes them."""
        config = self.model.config
        if not config.use_rotary_positional_embeddings:
            return None
        from diffusers.models.embeddings import get_3d_rotary_pos_embed
        from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

        frames, height, width = latents.shape[2:]
        grid = (height // self.patch_size, width // self.patch_size)
        base_height, base_width = config.sample_height // self.patch_size, config.sample_width // self.patch_size
        dim, device = config.attention_head_dim, latents.device
        rotary: tuple[Tensor, Tensor]
        if config.patch_size_t is None:  # CogVideoX 1.0 stretches the grid that it was trained on
            crop = get_resize_crop_region_for_grid(grid, base_width, base_height)
            rotary = get_3d_rotary_pos_embed(dim, crop, grid, frames, device=device)
        else:  # CogVideoX 1.5 cuts out of it
            rotary = get_3d_rotary_pos_embed(
                dim,
                None,
                grid,
                frames // self.patch_size_t,
                grid_type="slice",
                max_size=(base_height, base_width),
                device=device,
            )
        return rotary


class CogVideoXDecoder(ClipDecoderModule):
    """Latents of a clip -> the pixels of its frames."""

    kinds = (
        PartKind(1, is_first=True, leaves_cache=False),
        PartKind(3, is_first=True),
        PartKind(2, is_first=False),
    )

    @classmethod
    def parts(cls, latent_frames: int) -> tuple[int, ...]:
        """As `AutoencoderKLCogVideoX._decode` cuts: two latent frames each, and an odd one goes with the first two."""
        count = max(latent_frames // PART_FRAMES, 1)
        return (latent_frames - (count - 1) * PART_FRAMES, *(PART_FRAMES,) * (count - 1))

    def decode_part(self, latents: Tensor, cache: Cache | None) -> tuple[Tensor, Cache]:
        latents = self.to_vae(latents)
        if self.vae.post_quant_conv is not None:
            latents = self.vae.post_quant_conv(latents)
        names = self._cached_layers
        tree = None if cache is None else _tree(dict(zip(names, cache, strict=True)))
        pixels, left = self.vae.decoder(latents, conv_cache=tree)
        return self.levels(pixels), tuple(reduce(getitem, name, left) for name in names)

    @property
    def _cached_layers(self) -> list[tuple[str, ...]]:
        """Names of the layers that read frames of the part before, as paths in the VAE's nested cache."""
        return [
            tuple(re.sub(r"s\.(\d+)", r"_\1", name).split("."))  # up_blocks.0.resnets.1.conv1 has up_block_0, resnet_1
            for name, layer in self.vae.decoder.named_modules()
            if getattr(layer, "time_kernel_size", 1) > 1
        ]


PART_FRAMES = 2
"""Latent frames that `AutoencoderKLCogVideoX` decodes together."""


def _tree(leaves: Mapping[tuple[str, ...], Tensor]) -> dict[str, Any]:
    """Return nested dicts of tensors by their paths."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        branch = tree
        for name in path[:-1]:
            branch = branch.setdefault(name, {})
        branch[path[-1]] = leaf
    return tree


@final
class CogVideoX(Family):
    """Family of `CogVideoXPipeline`."""

    name = "cogvideox"
    pipelines = ("CogVideoXPipeline",)
    denoiser_class = "CogVideoXTransformer3DModel"
    adapter = CogVideoXDenoiser
    makes_clips = True
    vae_classes = ("AutoencoderKLCogVideoX",)
    decoder = CogVideoXDecoder

    def build_denoiser(self, load: Callable[[str], Any], index: Mapping[str, Any]) -> Denoiser:
        """Return the denoiser of a folder to serve.

        Raises:
            CheckpointError: it is CogVideoX 1.5, whose pipeline adds latent frames and cuts them off again.
        """
        model = load(self.denoiser_folder)
        if model.config.patch_size_t is not None:
            raise CheckpointError(
                f"patch_size_t is {model.config.patch_size_t}, as in CogVideoX 1.5, which this version does not serve; "
                "use CogVideoX-2b or CogVideoX-5b"
            )
        return CogVideoXDenoiser(model)

    def geometry(self, denoiser: Mapping[str, Any], vae: Mapping[str, Any]) -> LatentGeometry:
        """Return the rule. The VAE makes 8 k + 1 frames: of an even number of latent frames it makes 4 for each."""
        ratio = int(vae.get("temporal_compression_ratio", 4))
        return replace(
            super().geometry(denoiser, vae),
            temporal_compression=ratio,
            patch_size_t=int(denoiser.get("patch_size_t") or 1),
            frame_step=1 if ratio == 1 else 2 * ratio,
            draws_frames_first=True,
        )

    def native_clip(self, denoiser: Mapping[str, Any]) -> NativeClip:
        frames = int(denoiser.get("sample_frames", 49))
        return NativeClip(frames, fps=8, max_frames=2 * frames - 1)

    def max_tokens(self, encoders: TextEncoders) -> int:
        return int(encoders.denoiser_config.get("max_text_seq_length", 226))

    def encode_prompts(self, prompts: list[str], encoders: TextEncoders) -> Conditioning:
        embeds, _ = encoders.pipeline.encode_prompt(
            prompts,
            device=encoders.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_tokens(encoders),
        )
        return Conditioning(embeds)

    def replacement(self, part: nn.Module) -> tuple[str, Any] | None:
        from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXSafeConv3d
        from diffusers.models.embeddings import CogVideoXPatchEmbed
        from diffusers.models.upsampling import CogVideoXUpsample3D

        if isinstance(part, CogVideoXPatchEmbed) and part.use_positional_embeddings:
            return "_get_positional_embeddings", MethodType(_joint_position_embedding, part)
        if isinstance(part, CogVideoXDenoiser) and part.model.config.use_rotary_positional_embeddings:
            return "_rotary_embedding", MethodType(_traceable_rotary_embedding, part)
        if isinstance(part, CogVideoXSafeConv3d):  # splits a large input, for the same result
            return "forward", MethodType(nn.Conv3d.forward, part)
        if isinstance(part, CogVideoXUpsample3D):
            return "forward", MethodType(_upsampled, part)
        return None


def _upsampled(self: Any, inputs: Tensor) -> Tensor:
    """CogVideoXUpsample3D.forward [B, C, F, H, W] with whole numbers for sizes, which torch.export follows faster."""
    frames = inputs.shape[2]
    still = frames if not self.compress_time else 1 if frames == 1 else frames % 2
    """Frames at the start that stay one frame each; the others become two."""
    parts = [
        functional.interpolate(part, size=(factor * part.shape[2], 2 * part.shape[3], 2 * part.shape[4]))
        for part, factor in ((inputs[:, :, :still], 1), (inputs[:, :, still:], 2))
        if part.shape[2]
    ]
    wide = torch.cat(parts, dim=2)
    output: Tensor = self.conv(wide.transpose(1, 2).flatten(0, 1))
    return output.reshape(inputs.shape[0], wide.shape[2], *output.shape[1:]).transpose(1, 2)


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
    spatial = sines_2d(rows, columns, spatial_dim)[None].expand(frames, -1, -1)
    temporal = sines_1d(times, temporal_dim)[:, None].expand(-1, spatial.shape[1], -1)
    video = torch.cat([temporal, spatial], dim=-1).flatten(0, 1)
    return torch.cat([torch.zeros(self.max_text_seq_length, self.embed_dim), video])[None]


def _traceable_rotary_embedding(self: CogVideoXDenoiser, latents: Tensor) -> tuple[Tensor, Tensor]:
    """CogVideoXDenoiser._rotary_embedding in tensors: [F * H * W / patches, attention_head_dim] each."""
    config = self.model.config
    frames, height, width = latents.shape[2:]
    counted = [
        torch.arange(size, dtype=torch.float64)
        for size in (frames // self.patch_size_t, height // self.patch_size, width // self.patch_size)
    ]
    times, rows, columns = counted
    if config.patch_size_t is None:
        trained = (config.sample_height // self.patch_size, config.sample_width // self.patch_size)
        (top, bottom), (left, right) = _crop_region(length(rows), length(columns), *trained)
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
    """diffusers' get_resize_crop_region_for_grid without branches. float64 as in Python, because halves are rounded.

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
    """Return linspace(start, stop * (n - 1) / n, n) for counted = 0 ... n - 1."""
    count = length(counted)
    last = stop * (count - 1) / count
    return start + counted * ((last - start) / (count - 1).clamp(min=1))


def _rotary_frequencies(dim: int) -> Tensor:
    return 1.0 / 10000 ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
