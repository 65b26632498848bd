"""AnimateDiff, text to video: Stable Diffusion 1.5 whose UNet has motion modules between its layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, final

from torch import Tensor, nn

from tdm_runtime.families.conditioning import Conditioning
from tdm_runtime.families.denoiser import Denoiser
from tdm_runtime.families.family import Family, NativeClip, TextEncoders
from tdm_runtime.families.latent_space import Cache, ClipDecoderModule, LatentGeometry, PartKind
from tdm_runtime.families.prompt_weights import Chunk
from tdm_runtime.families.stable_diffusion import StableDiffusion
from tdm_runtime.families.unet import MANY_UPSAMPLERS, UNetDenoiser

MOTION_ADAPTER = "motion_adapter"
"""Folder of motion modules that are kept beside a UNet of pictures."""


class MotionUNetDenoiser(UNetDenoiser):
    """A UNet of pictures whose motion modules join the frames of a clip. Each frame reads the prompt."""

    latent_axes = ("frames", "height", "width")

    def predict(self, latents: Tensor, timesteps: Tensor, condition: Tensor | None, prompt: Conditioning) -> Tensor:
        """Call the UNet with latents [B, C, F, H, W]."""
        frames = latents.shape[2]
        output: Tensor = self.model(
            latents,
            timesteps,
            prompt.prompt_embeds.repeat_interleave(frames, dim=0),
            timestep_cond=condition,
            return_dict=False,
        )[0]
        return output


class FrameDecoder(ClipDecoderModule):
    """Latents of a clip -> the pixels of its frames, with a VAE of pictures."""

    kinds = (PartKind(1, is_first=True, leaves_cache=False),)

    @classmethod
    def parts(cls, latent_frames: int) -> tuple[int, ...]:
        return (1,) * latent_frames

    def decode_part(self, latents: Tensor, cache: Cache | None) -> tuple[Tensor, None]:
        return self(latents), None

    def forward(self, latents: Tensor) -> Tensor:
        """Return uint8 [B, F, H, W, 3] for latents [B, C, F, h, w]."""
        frames = latents.transpose(1, 2)
        pixels = super().forward(frames.flatten(0, 1))
        return pixels.reshape(*frames.shape[:2], *pixels.shape[1:])


@final
class AnimateDiff(Family):
    """Family of `AnimateDiffPipeline`. Text encoder, VAE and LoRAs are those of Stable Diffusion."""

    name = "animatediff"
    pipelines = ("AnimateDiffPipeline",)
    denoiser_folder = StableDiffusion.denoiser_folder
    denoiser_class = "UNetMotionModel"
    other_denoiser_classes: ClassVar = (StableDiffusion.denoiser_class,)
    adapter = MotionUNetDenoiser
    makes_clips = True
    reads_weights = True
    decoder = FrameDecoder

    def denoiser_parts(self, index: Mapping[str, Any]) -> tuple[str, ...]:
        parts = (self.denoiser_folder,)
        return parts if index[self.denoiser_folder][-1] == self.denoiser_class else (*parts, MOTION_ADAPTER)

    def build_denoiser(self, load: Callable[[str], Any], index: Mapping[str, Any]) -> Denoiser:
        """Return the denoiser: a UNet that holds its motion modules, or a UNet of pictures with a motion adapter."""
        unet = load(self.denoiser_folder)
        if len(self.denoiser_parts(index)) == 1:
            return MotionUNetDenoiser(unet)
        from diffusers import UNetMotionModel

        return MotionUNetDenoiser(UNetMotionModel.from_unet2d(unet, load(MOTION_ADAPTER)).eval())

    def native_clip(self, denoiser: Mapping[str, Any]) -> NativeClip:
        most = int(denoiser.get("motion_max_seq_length") or 32)
        return NativeClip(min(16, most), fps=8, max_frames=most)

    def geometry(self, denoiser: Mapping[str, Any], vae: Mapping[str, Any]) -> LatentGeometry:
        return replace(super().geometry(denoiser, vae), temporal_compression=1)

    def encode_pixels(self, vae: Any, pixels: Tensor) -> Tensor:
        """Return the latents [B, C, F, h, w] of clips [B, 3, F, H, W], encoded frame by frame."""
        frames = pixels.transpose(1, 2)
        latents = super().encode_pixels(vae, frames.flatten(0, 1))
        return latents.reshape(*frames.shape[:2], *latents.shape[1:]).transpose(1, 2)

    def encode_prompts(self, prompts: list[str], encoders: TextEncoders) -> Conditioning:
        return StableDiffusion().encode_prompts(prompts, encoders)

    def encode_chunks(self, chunks: Sequence[Chunk], encoders: TextEncoders) -> Conditioning:
        return StableDiffusion().encode_chunks(chunks, encoders)

    def replacement(self, part: nn.Module) -> tuple[str, Any] | None:
        from diffusers import UNetMotionModel

        return ("num_upsamplers", MANY_UPSAMPLERS) if isinstance(part, UNetMotionModel) else None
