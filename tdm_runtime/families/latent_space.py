"""Latents of a family: their shape as a rule, their units, and the module that turns them into pixels."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from tdm_runtime.backends.interface import Interface, TensorSpec, multiple_of


@dataclass(frozen=True)
class LatentGeometry:
    """Rule that gives the latent shape for a size in pixels and a number of frames."""

    family: str
    """Name of the family, for errors."""
    channels: int
    spatial_compression: int
    """Pixels per latent, along each side."""
    patch_size: int = 1
    """Latents per token, along each side."""
    temporal_compression: int | None = None
    """Frames per latent frame after the first, which stands for one frame. None for families that make pictures."""
    patch_size_t: int = 1
    """Latent frames per token."""
    frame_step: int = 1
    """A clip has 1 + frame_step k frames."""
    draws_frames_first: bool = False
    """Whether stock pipelines draw the noise of a clip as [F, C, H, W]."""

    @property
    def size_multiple(self) -> int:
        """Width and height in pixels must be multiples of it."""
        return self.spatial_compression * self.patch_size

    def latent_shape(self, width: int, height: int, frames: int = 1) -> tuple[int, ...]:
        """Return the shape of one sample: [C, H, W] for a picture, [C, F, H, W] for a clip.

        Args:
            width, height: in pixels.
            frames: of a clip; 1 for a picture.

        Raises:
            ValueError: the size or the number of frames does not give a whole number of tokens.
        """
        multiple = self.size_multiple
        if width < multiple or height < multiple or width % multiple or height % multiple:
            raise ValueError(f"the size is {width}x{height} pixels; {self.family} takes multiples of {multiple}")
        side = (height // self.spatial_compression, width // self.spatial_compression)
        if self.temporal_compression is None:
            if frames != 1:
                raise ValueError(f"frames is {frames}; {self.family} makes pictures, of 1 frame")
            return (self.channels, *side)
        if frames < 1:
            raise ValueError(f"frames is {frames}; it must be at least 1")
        if self.patch_size_t == 1 and (more := -(frames - 1) % self.frame_step):
            least = frames + more - self.frame_step
            raise ValueError(
                f"frames is {frames}; {self.family} makes 1 + {self.frame_step} k frames: ask for {least} or "
                f"{frames + more}"
            )
        latent_frames = (frames - 1) // self.temporal_compression + 1
        if missing := -latent_frames % self.patch_size_t:
            raise ValueError(
                f"frames is {frames}, which are {latent_frames} latent frames, and the model takes multiples of "
                f"{self.patch_size_t}; ask for {frames + missing * self.temporal_compression}"
            )
        return (self.channels, latent_frames, *side)


@dataclass(frozen=True)
class LatentScaling:
    """Conversion between the VAE's latents and the denoiser's, which have about unit variance."""

    factor: float
    shift: float
    mean: tuple[float, ...] = ()
    """Mean of each channel of the VAE's latents, in place of the shift; empty where the VAE states none."""
    std: tuple[float, ...] = ()
    """Standard deviation of each channel; empty where the VAE states none."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> LatentScaling:
        """Read scaling and shift from a VAE's config; without shift_factor the shift is 0.

        Like the pipeline of SDXL, it reads latents_mean and latents_std only where the VAE has both.
        """
        factor, shift = float(config["scaling_factor"]), float(config.get("shift_factor") or 0.0)
        mean, std = config.get("latents_mean"), config.get("latents_std")
        return cls(factor, shift) if mean is None or std is None else cls(factor, shift, tuple(mean), tuple(std))

    def to_vae(self, latents: Tensor) -> Tensor:
        """Return the denoiser's latents as the VAE decodes them."""
        if not self.std:
            return latents / self.factor + self.shift
        return latents * _by_channel(self.std, latents) / self.factor + _by_channel(self.mean, latents)

    def from_vae(self, latents: Tensor) -> Tensor:
        """Return what the VAE encoded as the denoiser reads it."""
        if not self.std:
            return (latents - self.shift) * self.factor
        return (latents - _by_channel(self.mean, latents)) * self.factor / _by_channel(self.std, latents)

    def std_from_vae(self, std: Tensor) -> Tensor:
        """Return the standard deviation of what the VAE encoded, as the denoiser reads it."""
        return std * self.factor / (_by_channel(self.std, std) if self.std else 1.0)


def encoded_by(vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of the VAE's latents of pictures; 0 where it has no distribution.

    Args:
        vae: a diffusers VAE.
        pixels: [B, 3, H, W] in [-1, 1].
    """
    found = vae.encode(pixels)
    if (distribution := getattr(found, "latent_dist", None)) is not None:
        return distribution.mean, distribution.std
    latents: Tensor = found.latent if hasattr(found, "latent") else found.latents
    return latents, torch.zeros_like(latents)


def _by_channel(values: tuple[float, ...], latents: Tensor) -> Tensor:
    """Return one number a channel, in the shape that multiplies latents [B, C, ...]."""
    return torch.tensor(values, dtype=latents.dtype, device=latents.device).view(-1, *(1,) * (latents.ndim - 2))


class EncodesPictures(Protocol):
    """A family, as `EncoderModule` calls it."""

    def encode_distribution(self, vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]: ...


class DecoderModule(nn.Module):
    """The denoiser's latents -> pixels as picture files store them."""

    def __init__(self, vae: Any) -> None:
        """Take a diffusers VAE, full or tiny."""
        super().__init__()
        self.vae = vae.eval()

    def to_vae(self, latents: Tensor) -> Tensor:
        """Return the denoiser's latents as the VAE decodes them."""
        return LatentScaling.of(self.vae.config).to_vae(latents)

    def forward(self, latents: Tensor) -> Tensor:
        """Return uint8 [B, H, W, 3] for latents [B, C, h, w], or [B, frames, H, W, 3] for [B, C, F, h, w]."""
        return self.levels(self.vae.decode(self.to_vae(latents), return_dict=False)[0])

    def levels(self, pixels: Tensor) -> Tensor:
        """Return what the VAE decoded, [B, 3, ...] in [-1, 1], as uint8 [B, ..., 3]."""
        levels: Tensor = (pixels.float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)
        return levels.movedim(1, -1).contiguous()

    @property
    def channels(self) -> int:
        """Channels of the denoiser's latents."""
        return int(self.vae.config.latent_channels)

    def interface(self) -> Interface:
        """Return what `forward` is called with."""
        return Interface(
            (TensorSpec("latents", "float32", ("batch", self.channels, "height", "width")),),
            TensorSpec("pixels", "uint8", ("batch", "height_px", "width_px", 3)),
        )


class EncoderModule(nn.Module):
    """Pictures -> mean and standard deviation of their latents, as the denoiser reads them."""

    def __init__(self, family: EncodesPictures, vae: Any, geometry: LatentGeometry) -> None:
        """Take a diffusers VAE of a family that makes pictures."""
        super().__init__()
        self.vae = vae.eval()
        self._family = family
        self._geometry = geometry

    def forward(self, pixels: Tensor) -> Tensor:
        """Return [B, 2C, h, w], the means then the standard deviations, for pixels [B, 3, H, W] in [-1, 1]."""
        return torch.cat(self._family.encode_distribution(self.vae, pixels), dim=1)

    def interface(self) -> Interface:
        """Return what `forward` is called with."""
        sides = [multiple_of(side, self._geometry.spatial_compression) for side in ("height", "width")]
        return Interface(
            (TensorSpec("pixels", "float32", ("batch", 3, *sides)),),
            TensorSpec("latents", "float32", ("batch", 2 * self._geometry.channels, "height", "width")),
        )


Cache = tuple[Tensor, ...]
"""What a part of a clip leaves for the next one: the last inputs of causal convolutions, [B, C, F, h, w] each."""


@dataclass(frozen=True)
class PartKind:
    """Parts of clips that one compiled program decodes."""

    latent_frames: int
    is_first: bool
    leaves_cache: bool = True
    """Whether a next part needs what this one leaves."""

    @property
    def name(self) -> str:
        """Name in the files of artifacts."""
        return f"{'first' if self.is_first else 'later'}_{self.latent_frames}"


class ClipDecoderModule(DecoderModule):
    """Decoder of clips that can stop between parts of a clip. The parts together are what `forward` gives at once."""

    kinds: ClassVar[tuple[PartKind, ...]]
    """Kinds of the parts that clips are made of; a first part that leaves a cache comes before those that read it."""

    @classmethod
    @abstractmethod
    def parts(cls, latent_frames: int) -> tuple[int, ...]:
        """Return the latent frames of each part of a clip, in order."""

    @abstractmethod
    def decode_part(self, latents: Tensor, cache: Cache | None) -> tuple[Tensor, Cache | None]:
        """Decode the next part of a clip.

        Args:
            latents: of the part, [B, C, F, h, w].
            cache: what the part before left; None for the first. It is not changed.

        Returns:
            Pixels, uint8 [B, frames, H, W, 3], and the cache for the next part; None if no part needs any.
        """

    def interface(self) -> Interface:
        return Interface(
            (TensorSpec("latents", "float32", ("batch", self.channels, "frames", "height", "width")),),
            TensorSpec("pixels", "uint8", ("batch", "num_frames", "height_px", "width_px", 3)),
        )


class ClipPart(nn.Module):
    """Decodes parts of one kind, as a module to compile: latents and cache in, pixels and the next cache out."""

    def __init__(self, decoder: ClipDecoderModule, kind: PartKind) -> None:
        super().__init__()
        self.decoder = decoder
        self.kind = kind

    def forward(self, latents: Tensor, **cache: Tensor) -> tuple[Tensor, ...]:
        """Return the pixels, then the cache for the next part; see `ClipDecoderModule.decode_part`."""
        pixels, left = self.decoder.decode_part(latents, tuple(cache.values()) or None)
        return (pixels, *(left or ())) if self.kind.leaves_cache else (pixels,)

    def interface(self) -> Interface:
        """Return what `forward` is called with."""
        pixels, before, left = self._decode_a_latent()
        latents = ("batch", self.decoder.channels, self.kind.latent_frames, "height", "width")
        return Interface(
            (TensorSpec("latents", "float32", latents), *_cache_specs("cache", before)),
            TensorSpec("pixels", "uint8", ("batch", pixels.shape[1], "height_px", "width_px", 3)),
            _cache_specs("next_cache", left if self.kind.leaves_cache else ()),
        )

    @torch.no_grad()
    def _decode_a_latent(self) -> tuple[Tensor, Cache, Cache]:
        """Decode one latent a frame, which shows the shapes: pixels, the cache before and the cache after."""

        def latents(kind: PartKind) -> Tensor:
            return torch.zeros(1, self.decoder.channels, kind.latent_frames, 1, 1)

        before: Cache | None = None
        if not self.kind.is_first:
            first = next(kind for kind in self.decoder.kinds if kind.is_first and kind.leaves_cache)
            _, before = self.decoder.decode_part(latents(first), None)
        pixels, left = self.decoder.decode_part(latents(self.kind), before)
        return pixels, before or (), left or ()


def _cache_specs(name: str, cache: Cache) -> tuple[TensorSpec, ...]:
    """Return the specs of a cache that was left by one latent a frame, so that its sides are factors."""
    shapes = (tensor.shape for tensor in cache)
    return tuple(
        TensorSpec(
            f"{name}_{number}",
            "float32",
            ("batch", channels, frames, multiple_of("height", height), multiple_of("width", width)),
        )
        for number, (_, channels, frames, height, width) in enumerate(shapes)
    )


class ClipParts(nn.Module):
    """Runs a decoder part by part, as a module with one input and one output. It keeps the cache between parts."""

    def __init__(self, decoder: ClipDecoderModule) -> None:
        super().__init__()
        self.decoder = decoder
        self.cache: Cache | None = None
        """What the part before left; None before the first part of a clip."""

    def forward(self, latents: Tensor) -> Tensor:
        """Return the pixels of the next part; see `ClipDecoderModule.decode_part`."""
        pixels, self.cache = self.decoder.decode_part(latents, self.cache)
        return pixels
