"""UNet2DConditionModel, which Stable Diffusion and SDXL share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tdm_runtime.backends.interface import DType
from tdm_runtime.families.conditioning import Conditioning
from tdm_runtime.families.denoiser import Denoiser, require, require_outputs
from tdm_runtime.families.family import Family, TextEncoders
from tdm_runtime.families.prompt_weights import Chunk

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

MANY_UPSAMPLERS = 30
"""Number of upsamplers that torch.export sees. A UNet doubles sizes that are multiples of 2**upsamplers and passes all
other sizes on. A program that was traced with a multiple would fail at the others; no size is a multiple of 2**30, so
every size is passed on."""


class UNetDenoiser(Denoiser):
    """K goes in by the UNet's own `timestep_cond`, so stock pipelines can run the checkpoint too."""

    timestep_embedding_name = "time_embedding"
    text_dim_name = "cross_attention_dim"
    saves_step_condition = True

    def __init__(self, model: UNet2DConditionModel) -> None:
        super().__init__(model)
        require_outputs(model, (self.latent_channels,))
        self._reads_guidance = False

    @property
    def reads_step_count(self) -> bool:
        return super().reads_step_count and not self._reads_guidance

    def read_guidance(self) -> None:
        """Give the guidance scale to the input that K would take, as latent consistency models were distilled."""
        self._reads_guidance = True

    def conditioning_inputs(self, tokens: int | str) -> Mapping[str, tuple[DType, Sequence[int | str]]]:
        return {"guidance": ("float32", ())} if self._reads_guidance else {}

    def predict(self, latents: Tensor, timesteps: Tensor, condition: Tensor | None, prompt: Conditioning) -> Tensor:
        """Call the UNet with latents [B, C, H, W]."""
        if self._reads_guidance:
            guidance = require("guidance", prompt.guidance, "a latent consistency model")
            condition = self._embedded(guidance - 1.0)
        output: Tensor = self.model(
            latents,
            timesteps,
            prompt.prompt_embeds,
            timestep_cond=condition,
            added_cond_kwargs=self._added_conditions(prompt),
            encoder_attention_mask=prompt.attention_mask,
            return_dict=False,
        )[0]
        return output

    def add_step_condition(self, dim: int = 256) -> None:
        """Give the UNet an input for K and register it in the config, so save_pretrained and from_pretrained keep it.

        Args:
            dim: see `Denoiser.add_step_condition`.
        """
        super().add_step_condition(dim)
        self.model.register_to_config(time_cond_proj_dim=self.condition_dim)

    def _added_conditions(self, prompt: Conditioning) -> dict[str, Tensor] | None:
        """Return what the UNet reads beside the prompt's embeddings."""
        return None


class UNetFamily(Family):
    """What Stable Diffusion and SDXL have in common."""

    denoiser_folder = "unet"
    denoiser_class = "UNet2DConditionModel"
    reads_weights = True

    def is_denoiser(self, model: Any) -> bool:
        """Return whether a model is this family's UNet: only those of SDXL read the size of the picture."""
        return super().is_denoiser(model) and reads_picture_size(model) == self._reads_picture_size

    _reads_picture_size = False

    def replacement(self, part: nn.Module) -> tuple[str, Any] | None:
        from diffusers import UNet2DConditionModel

        return ("num_upsamplers", MANY_UPSAMPLERS) if isinstance(part, UNet2DConditionModel) else None


def clip_states(encoders: TextEncoders, number: int, chunks: Sequence[Chunk]) -> Any:
    """Return what a CLIP of a stock pipeline makes of N chunks, with hidden states [N, L, D] of all layers.

    Args:
        number: 0 for the first text encoder, 1 for the second.
    """
    ending = "_2" if number else ""
    tokenizer, encoder = (getattr(encoders.pipeline, part + ending) for part in ("tokenizer", "text_encoder"))
    frame = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.model_max_length)
    ids = torch.tensor([chunk.framed(*frame) for chunk in chunks], device=encoders.device)
    return encoder(ids, output_hidden_states=True)


def reads_picture_size(unet: Any) -> bool:
    """Return whether a UNet reads pooled embeddings and the size of the picture beside the prompt."""
    return bool(unet.config.addition_embed_type == "text_time")
