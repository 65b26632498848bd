"""Wan 2.1 and 2.2, text to video: a UMT5 text encoder, one or two WanTransformer3DModel and a causal VAE of clips."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from tdm_runtime.errors import CheckpointError
from tdm_runtime.families.conditioning import Conditioning
from tdm_runtime.families.denoiser import Denoiser, PassedCondition, require_outputs
from tdm_runtime.families.family import Family, NativeClip, TextEncoders
from tdm_runtime.families.latent_space import Cache, ClipDecoderModule, LatentGeometry, LatentScaling, PartKind

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel

LOW_NOISE_EXPERT = "transformer_2"
"""Folder of the transformer for low noise, which Wan 2.2 A14B has beside the one for high noise."""
TRAIN_TIMESTEPS = 1000
"""Timesteps are sigmas times this."""


class WanDenoiser(Denoiser):
    """Receives t = 1000 sigma. Of two experts each sample passes the one of its noise level."""

    timestep_embedding_name = "condition_embedder.time_embedder"
    text_dim_name = "text_dim"
    latent_axes = ("frames", "height", "width")

    def __init__(
        self, model: WanTransformer3DModel, low_noise: WanTransformer3DModel | None = None, boundary: float = 0.0
    ) -> None:
        """
        Args:
            model: the only transformer, or the expert for high noise.
            low_noise: the expert for timesteps below `boundary`.
            boundary: timestep, in 0..1000.

        Raises:
            CheckpointError: the model reads a picture too, or is made of tokens that this version does not know.
        """
        super().__init__(model)
        if model.config.image_dim is not None:
            raise CheckpointError("image_dim is set: the model reads a picture; use a text-to-video checkpoint of Wan")
        time, *sides = model.config.patch_size
        if time != 1 or sides[0] != sides[1]:
            raise CheckpointError(f"patch_size is {model.config.patch_size}; this version serves [1, n, n]")
        require_outputs(model, (self.latent_channels,))
        self.patch_size = int(sides[0])
        self.low_noise = low_noise
        self.boundary = boundary
        self._condition = PassedCondition(self.timestep_embedding)

    @property
    def further_models(self) -> Mapping[str, nn.Module]:
        return {} if self.low_noise is None else {LOW_NOISE_EXPERT: self.low_noise}

    def predict(self, latents: Tensor, timesteps: Tensor, condition: Tensor | None, prompt: Conditioning) -> Tensor:
        """Call the transformer with latents [B, C, F, H, W].

        Wan 2.2 5B takes a timestep for each token (`expand_timesteps`). In text to video all tokens of a sample have
        the same one, so one for each sample gives the same output.
        """
        if self.low_noise is None:
            return self._of_expert(self.model, latents, timesteps, condition, prompt)
        is_low = timesteps < self.boundary
        output = torch.empty_like(latents)
        for expert, rows in ((self.model, ~is_low), (self.low_noise, is_low)):
            if rows.any():
                mine = None if condition is None else condition[rows]
                output[rows] = self._of_expert(expert, latents[rows], timesteps[rows], mine, prompt[rows])
        return output

    def _of_expert(
        self, expert: Any, latents: Tensor, timesteps: Tensor, condition: Tensor | None, prompt: Conditioning
    ) -> Tensor:
        with self._condition.during(condition):
            output: Tensor = expert(latents, timesteps, prompt.prompt_embeds, return_dict=False)[0]
        return output


class WanDecoder(ClipDecoderModule):
    """Latents of a clip -> the pixels of its frames, one latent frame at a time, as `AutoencoderKLWan._decode` goes."""

    def to_vae(self, latents: Tensor) -> Tensor:
        return _scaling(self.vae.config).to_vae(latents)

    kinds = (PartKind(1, is_first=True), PartKind(1, is_first=False))

    @property
    def channels(self) -> int:
        return int(self.vae.config.z_dim)

    @classmethod
    def parts(cls, latent_frames: int) -> tuple[int, ...]:
        return (1,) * latent_frames

    def decode_part(self, latents: Tensor, cache: Cache | None) -> tuple[Tensor, Cache]:
        from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

        layers = self.vae._cached_conv_counts["decoder"]
        features = [None] * layers if cache is None else [*cache, *[None] * (layers - len(cache))]
        latents = self.vae.post_quant_conv(self.to_vae(latents))
        pixels = self.vae.decoder(latents, feat_cache=features, feat_idx=[0], first_chunk=cache is None)
        if self.vae.config.patch_size is not None:
            pixels = unpatchify(pixels, patch_size=self.vae.config.patch_size)
        return self.levels(pixels), _full_cache(features)


CACHE_FRAMES = 2
"""Frames that a convolution over three frames reads of the part before."""


def _full_cache(features: Sequence[Tensor | str | None]) -> Cache:
    """Return the cache with `CACHE_FRAMES` frames a layer, so that all later parts are alike.

    After the first part it has one frame a layer, and "Rep" for a layer that first widens time in the second part. The
    VAE pads both with zeros there. Layers without a cache come last and have None.
    """
    full: list[Tensor] = []
    for feature in features:
        if isinstance(feature, Tensor):
            missing = CACHE_FRAMES - feature.shape[2]
            full.append(functional.pad(feature, (0, 0, 0, 0, missing, 0)) if missing else feature)
        elif feature is not None:
            full.append(torch.zeros_like(full[-1]))  # the layer before has as many channels and the same size
    return tuple(full)


@final
class Wan(Family):
    """Family of `WanPipeline`."""

    name = "wan"
    pipelines = ("WanPipeline",)
    denoiser_class = "WanTransformer3DModel"
    adapter = WanDenoiser
    makes_clips = True
    vae_classes = ("AutoencoderKLWan",)
    decoder = WanDecoder

    def denoiser_parts(self, index: Mapping[str, Any]) -> tuple[str, ...]:
        return (self.denoiser_folder, LOW_NOISE_EXPERT) if _has_two_experts(index) else (self.denoiser_folder,)

    def build_denoiser(self, load: Callable[[str], Any], index: Mapping[str, Any]) -> Denoiser:
        if not _has_two_experts(index):
            return WanDenoiser(load(self.denoiser_folder))
        ratio = index.get("boundary_ratio")
        if not isinstance(ratio, int | float) or not 0 <= ratio <= 1:
            raise CheckpointError(
                f"boundary_ratio of model_index.json is {ratio!r}; a pipeline of two transformers has a number from 0 "
                "to 1: restore the folder from its source"
            )
        return WanDenoiser(load(self.denoiser_folder), load(LOW_NOISE_EXPERT), ratio * TRAIN_TIMESTEPS)

    def native_clip(self, denoiser: Mapping[str, Any]) -> NativeClip:
        is_5b = denoiser.get("in_channels") == 48
        frames = 121 if is_5b else 81
        return NativeClip(frames, fps=24 if is_5b else 16, max_frames=2 * frames - 1)

    def latent_channels(self, vae: Mapping[str, Any]) -> int | None:
        channels = vae.get("z_dim")
        return None if channels is None else int(channels)

    def spatial_compression(self, vae: Mapping[str, Any]) -> int:
        return int(vae.get("scale_factor_spatial", 8))

    def geometry(self, denoiser: Mapping[str, Any], vae: Mapping[str, Any]) -> LatentGeometry:
        ratio = int(vae.get("scale_factor_temporal", 4))
        patch = denoiser.get("patch_size") or (1, 2, 2)
        plain = super().geometry({**denoiser, "patch_size": patch[1]}, vae)
        return replace(plain, temporal_compression=ratio, frame_step=ratio)

    def encode_pixels(self, vae: Any, pixels: Tensor) -> Tensor:
        mean: Tensor = vae.encode(pixels).latent_dist.mode()
        return _scaling(vae.config).from_vae(mean)

    def replacement(self, part: nn.Module) -> tuple[str, Any] | None:
        from diffusers.models.autoencoders.autoencoder_kl_wan import WanUpsample

        return ("forward", _upsampled) if isinstance(part, WanUpsample) else None

    def max_tokens(self, encoders: TextEncoders) -> int:
        return 512

    def encode_prompts(self, prompts: list[str], encoders: TextEncoders) -> Conditioning:
        """Encode prompts as the pipeline does: cleaned, and zeros behind the last token, up to 512."""
        embeds, _ = encoders.pipeline.encode_prompt(
            prompts,
            device=encoders.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_tokens(encoders),
        )
        return Conditioning(embeds)


def _upsampled(pixels: Tensor) -> Tensor:
    """WanUpsample.forward [B, C, H, W] with whole numbers for sizes, which torch.export follows faster."""
    height, width = pixels.shape[2:]
    return functional.interpolate(pixels, size=(2 * height, 2 * width), mode="nearest-exact")


def _has_two_experts(index: Mapping[str, Any]) -> bool:
    part = index.get(LOW_NOISE_EXPERT)
    return isinstance(part, list) and part[-1] is not None


def _scaling(config: Mapping[str, Any]) -> LatentScaling:
    return LatentScaling(1.0, 0.0, tuple(config["latents_mean"]), tuple(config["latents_std"]))
