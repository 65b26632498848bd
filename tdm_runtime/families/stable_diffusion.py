"""Stable Diffusion 1 and 2, and the embedded checkpoint: one CLIP text encoder and a UNet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, final

from tdm_runtime.families.conditioning import Conditioning
from tdm_runtime.families.family import TextEncoders
from tdm_runtime.families.prompt_weights import Chunk, weighted
from tdm_runtime.families.unet import UNetDenoiser, UNetFamily, clip_states


@final
class StableDiffusion(UNetFamily):
    """Family of `StableDiffusionPipeline`."""

    name = "stable_diffusion"
    former_name = "sd"
    pipelines = ("StableDiffusionPipeline", "LatentConsistencyModelPipeline")
    pipeline_options: ClassVar = {"requires_safety_checker": False}
    adapter = UNetDenoiser

    def encode_prompts(self, prompts: list[str], encoders: TextEncoders) -> Conditioning:
        embeds, _ = encoders.pipeline.encode_prompt(prompts, encoders.device, 1, do_classifier_free_guidance=False)
        return Conditioning(embeds)

    def encode_chunks(self, chunks: Sequence[Chunk], encoders: TextEncoders) -> Conditioning:
        return Conditioning(weighted(clip_states(encoders, 0, chunks)[0], chunks))
