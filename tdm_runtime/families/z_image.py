"""Z-Image: a Qwen3 text encoder and ZImageTransformer2DModel, which reads prompts without their padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from tdm_runtime.backends.interface import DType
from tdm_runtime.families.conditioning import Conditioning
from tdm_runtime.families.denoiser import Denoiser, PassedCondition, require
from tdm_runtime.families.family import Family, TextEncoders
from tdm_runtime.families.latent_space import LatentGeometry

if TYPE_CHECKING:
    from diffusers import ZImageTransformer2DModel

PATCH_SIZE = 2
"""Latents per token side: the default of the transformer's `forward`, which its pipeline keeps."""
MAX_TOKENS = 512
"""Tokens of the longest prompt, the default of the pipeline."""


class _AddedCondition(PassedCondition):
    """Adds the projected K to the sinusoid, as diffusers' TimestepEmbedding does; Z-Image's own embedder cannot."""

    def __init__(self, embedder: Any) -> None:
        super().__init__(embedder.mlp)
        self._embedder = embedder

    def _add(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._condition is None:
            return None
        return (args[0] + self._embedder.cond_proj(self._condition),), kwargs


class ZImageDenoiser(Denoiser):
    """The transformer's time runs from 0 for noise to 1, and its output points the same way; ours are turned round."""

    timestep_embedding_name = "t_embedder"

    def __init__(self, model: ZImageTransformer2DModel) -> None:
        super().__init__(model)
        self.patch_size = PATCH_SIZE
        if not hasattr(self.timestep_embedding, "cond_proj"):
            self.timestep_embedding.register_module("cond_proj", None)
        self._passed = _AddedCondition(self.timestep_embedding)

    @property
    def text_dim(self) -> int:
        width: int = self.model.config.cap_feat_dim
        return width

    @property
    def sinusoid_layer(self) -> nn.Linear:
        layer: nn.Linear = self.timestep_embedding.mlp[0]
        return layer

    def conditioning_inputs(self, tokens: int | str) -> Mapping[str, tuple[DType, Sequence[int | str]]]:
        return {"attention_mask": ("int64", (tokens,))}

    def predict(self, latents: Tensor, timesteps: Tensor, condition: Tensor | None, prompt: Conditioning) -> Tensor:
        """Call the transformer with latents [B, C, H, W] and timesteps of sigma * 1000.

        The padding of prompt_embeds, which attention_mask marks, stands behind the prompts. It is cut off, as the
        transformer pads each prompt by learned tokens and places the picture behind them.
        """
        mask = require("attention_mask", prompt.attention_mask, "Z-Image")
        lengths = mask.sum(dim=1).tolist()
        with self._passed.during(condition):
            outputs: list[Tensor] = self.model(
                list(latents.unsqueeze(2)),  # each [C, 1, H, W], a clip of one frame
                (1000 - timesteps) / 1000,
                [embeds[:length] for embeds, length in zip(prompt.prompt_embeds, lengths, strict=True)],
                return_dict=False,
            )[0]
        return -torch.stack(outputs).squeeze(2)


@final
class ZImage(Family):
    """Family of `ZImagePipeline`."""

    name = "z_image"
    pipelines = ("ZImagePipeline",)
    denoiser_class = "ZImageTransformer2DModel"
    adapter = ZImageDenoiser

    def geometry(self, denoiser: Mapping[str, Any], vae: Mapping[str, Any]) -> LatentGeometry:
        return replace(super().geometry(denoiser, vae), patch_size=PATCH_SIZE)

    def encode_prompts(self, prompts: list[str], encoders: TextEncoders) -> Conditioning:
        """Encode prompts. The pipeline returns the tokens of each alone; zeros fill them up to `MAX_TOKENS`."""
        embeds, _ = encoders.pipeline.encode_prompt(
            list(prompts),  # it writes its chat template into the list
            device=encoders.device,
            do_classifier_free_guidance=False,
            max_sequence_length=MAX_TOKENS,
        )
        padded = [functional.pad(tokens, (0, 0, 0, MAX_TOKENS - len(tokens))) for tokens in embeds]
        lengths = torch.tensor([len(tokens) for tokens in embeds], device=encoders.device)
        mask = torch.arange(MAX_TOKENS, device=encoders.device) < lengths[:, None]
        return Conditioning(torch.stack(padded), attention_mask=mask.long())
