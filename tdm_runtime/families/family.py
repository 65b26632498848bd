"""`Family`: everything that is particular to one model architecture.

Each family has a file of its own with its `Family` and its `Denoiser`. Training, export and serving read them from
the registry (`tdm_runtime.families`). A family imports diffusers inside its methods only, because importing it takes
most of the time of a start that otherwise needs compiled programs alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tdm_runtime.edit import ReferenceRule
from tdm_runtime.errors import CheckpointError
from tdm_runtime.families.conditioning import Conditioning
from tdm_runtime.families.denoiser import Denoiser
from tdm_runtime.families.latent_space import DecoderModule, LatentGeometry, LatentScaling, encoded_by
from tdm_runtime.families.prompt_weights import Chunk

ATTENTION_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
"""Attention layers by the end of their name, as diffusers' own LoRA training scripts choose them."""


@dataclass(frozen=True)
class TextEncoders:
    """A stock pipeline with its tokenizers and text encoders, and what a family reads beside the prompts."""

    pipeline: Any
    """A diffusers pipeline without denoiser and VAE, on its device."""
    denoiser_config: Mapping[str, Any]
    """config.json of the denoiser."""
    width: int
    """Width of the pictures, in pixels."""
    height: int
    """Height of the pictures, in pixels."""

    @property
    def device(self) -> torch.device:
        """Device of the text encoders."""
        device: torch.device = self.pipeline.device
        return device


@dataclass(frozen=True)
class NativeClip:
    """The clip that a stock pipeline makes by default."""

    frames: int
    fps: int
    """Frames per second."""
    max_frames: int
    """Most frames that the model is asked for."""


@dataclass(frozen=True)
class Family(ABC):
    """One model architecture. Families hold no state; two of the same class are equal."""

    name: ClassVar[str]
    """Name in the registry, in files and in errors."""
    former_name: ClassVar[str | None] = None
    """Name that earlier versions wrote into files."""
    pipelines: ClassVar[tuple[str, ...]]
    """Values of `_class_name` in model_index.json that the family opens."""
    pipeline_options: ClassVar[Mapping[str, Any]] = {}
    """Arguments that the pipeline's `from_pretrained` needs when parts are left out."""

    denoiser_folder: ClassVar[str] = "transformer"
    """Folder of the denoiser in a pipeline folder, and the prefix of its layers in LoRA files."""
    denoiser_class: ClassVar[str]
    """Name of the denoiser's class in diffusers. The class itself is imported only when it is loaded."""
    former_denoiser_class: ClassVar[str | None] = None
    """Name of that class in folders that were published before diffusers renamed it."""
    other_denoiser_classes: ClassVar[tuple[str, ...]] = ()
    """Further classes in that folder which `build_denoiser` makes the denoiser of."""
    adapter: ClassVar[type[Denoiser]]
    """Adapter that calls the denoiser."""
    lora_targets: ClassVar[tuple[str, ...]] = ATTENTION_PROJECTIONS
    """Layers that LoRAs change, by the end of their name."""

    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer",)
    """Folders of the tokenizers, in order."""
    text_encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    """Folders of the text encoders, in order."""
    optional_text: ClassVar[tuple[str, ...]] = ()
    """Those of these folders that a pipeline may come without."""
    reads_weights: ClassVar[bool] = False
    """Whether words of a prompt can be weighted, as is usual for CLIP; then it has `encode_chunks`."""

    makes_clips: ClassVar[bool] = False
    """Whether a sample is a clip, with latents [C, F, H, W]. Otherwise it is a picture, with latents [C, H, W]."""
    vae_classes: ClassVar[tuple[str, ...]] = ("AutoencoderKL", "AutoencoderTiny")
    """Names of the VAE classes in diffusers: the full one, then tiny ones with the same latents."""
    decoder: ClassVar[type[DecoderModule]] = DecoderModule
    """Module that decodes latents with any of these VAEs."""
    references: ClassVar[ReferenceRule | None] = None
    """Rule of the reference pictures that the denoiser reads; None where it reads none."""

    def is_denoiser(self, model: Any) -> bool:
        """Return whether a diffusers model is this family's denoiser."""
        return any(ancestor.__name__ == self.denoiser_class for ancestor in type(model).__mro__)

    def denoiser_parts(self, index: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the folders that the denoiser is made of.

        Args:
            index: content of model_index.json.
        """
        return (self.denoiser_folder,)

    def build_denoiser(self, load: Callable[[str], Any], index: Mapping[str, Any]) -> Denoiser:
        """Return the denoiser of a pipeline folder.

        Args:
            load: returns the model of a part of the folder, in eval mode.
            index: content of model_index.json.
        """
        return self.adapter(load(self.denoiser_folder))

    def native_clip(self, denoiser: Mapping[str, Any]) -> NativeClip | None:
        """Return the clip that the stock pipeline makes by default; None for families that make pictures.

        Args:
            denoiser: content of its config.json.
        """
        return None

    def latent_channels(self, vae: Mapping[str, Any]) -> int | None:
        """Return the channels of the latents as the denoiser reads them, by the VAE's config; None if it lacks them."""
        channels = vae.get("latent_channels")
        return None if channels is None else int(channels)

    def spatial_compression(self, vae: Mapping[str, Any]) -> int:
        """Return pixels per latent along each side, by the VAE's config.

        Raises:
            CheckpointError: the config does not tell.
        """
        levels = vae.get("block_out_channels")
        if not isinstance(levels, list | tuple):
            raise CheckpointError("vae/config.json lacks block_out_channels; restore the folder from its source")
        return int(2 ** (len(levels) - 1))

    def geometry(self, denoiser: Mapping[str, Any], vae: Mapping[str, Any]) -> LatentGeometry:
        """Return the shape of the latents as a rule.

        Args:
            denoiser: config of the loaded model, which holds the defaults of its class too.
            vae: content of the VAE's config.json.

        Raises:
            CheckpointError: the VAE's config does not tell how far it compresses.
        """
        return LatentGeometry(
            family=self.name,
            channels=int(denoiser["in_channels"]),
            spatial_compression=self.spatial_compression(vae),
            patch_size=int(denoiser.get("patch_size") or 1),
        )

    def decoder_dtype(self, vae: Mapping[str, Any], dtype: torch.dtype) -> torch.dtype:
        """Return the type that the full decoder runs in, given its config and the type of the model.

        It is the model's, unless numbers of the decoder leave the range of that type.
        """
        return dtype

    def encode_pixels(self, vae: Any, pixels: Tensor) -> Tensor:
        """Return latents as the denoiser reads them: the mean of the VAE's distribution, scaled.

        Args:
            vae: full VAE of the family.
            pixels: [B, 3, H, W] of pictures or [B, 3, F, H, W] of clips, in [-1, 1].
        """
        return self.encode_distribution(vae, pixels)[0]

    def encode_distribution(self, vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the latents of `encode_pixels`; 0 where the VAE has no distribution."""
        mean, std = encoded_by(vae, pixels)
        scaling = LatentScaling.of(vae.config)
        return scaling.from_vae(mean), scaling.std_from_vae(std)

    def reference_tokens(self, latents: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return `Conditioning.reference_tokens` and `reference_positions` of one sample. Only families with
        `references` have it.

        Args:
            latents: those of each picture, [C, h, w].
        """
        raise NotImplementedError(f"{self.name} reads no reference pictures")

    def tokenizer(self, encoders: TextEncoders) -> Any:
        """Return the tokenizer of the text encoder that reads the most: the last one that the pipeline has."""
        there = (getattr(encoders.pipeline, name) for name in reversed(self.tokenizers))
        return next(tokenizer for tokenizer in there if tokenizer is not None)

    def max_tokens(self, encoders: TextEncoders) -> int:
        """Return how many tokens of a prompt are read; by default as many as the last tokenizer says."""
        return int(self.tokenizer(encoders).model_max_length)

    def time_ids(self, width: int, height: int) -> tuple[float, ...] | None:
        """Return what the denoiser reads about the size of the picture, in pixels (`Conditioning.time_ids`)."""
        return None

    @abstractmethod
    def encode_prompts(self, prompts: list[str], encoders: TextEncoders) -> Conditioning:
        """Encode prompts as the stock pipeline does, without guidance; "" is the negative prompt."""

    def encode_chunks(self, chunks: Sequence[Chunk], encoders: TextEncoders) -> Conditioning:
        """Encode one prompt with weighted words. Only families that say `reads_weights` have it."""
        raise NotImplementedError(f"{self.name} reads no weights")

    def replacement(self, part: nn.Module) -> tuple[str, Any] | None:
        """Return what torch.export needs replaced on a module: the attribute and its value; None for nothing.

        The models compute some things in Python from the sizes of their inputs. torch.export would write the
        numbers of the traced size into the program as constants, or stop. A replacement gives the same results.
        """
        return None
