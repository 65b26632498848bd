"""FLUX.2 [klein]: a Qwen3, Flux2Transformer2DModel and a VAE whose latents are patchified and normalised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MethodType
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from tdm_runtime.backends.interface import DType
from tdm_runtime.edit import ReferenceRule
from tdm_runtime.errors import CheckpointError
from tdm_runtime.families.call import REFERENCES
from tdm_runtime.families.conditioning import Conditioning
from tdm_runtime.families.denoiser import Denoiser, PassedCondition, require_outputs
from tdm_runtime.families.family import ATTENTION_PROJECTIONS, Family, TextEncoders
from tdm_runtime.families.latent_space import DecoderModule, encoded_by
from tdm_runtime.families.positions import rotary_embedding

if TYPE_CHECKING:
    from diffusers import Flux2Transformer2DModel

PATCH_SIZE = 2
"""VAE latents along each side of a token. Each token is one latent of the denoiser, with four times the channels."""
REFERENCE_STEP = 10
"""Distance between references along the first axis of positions; the picture that is made is at 0."""


class Flux2Denoiser(Denoiser):
    """Reads a token for each latent. K passes by `PassedCondition`, as the transformer has no argument for it."""

    timestep_embedding_name = "time_guidance_embed.timestep_embedder"
    text_dim_name = "joint_attention_dim"

    def __init__(self, model: Flux2Transformer2DModel) -> None:
        super().__init__(model)
        require_outputs(model, (self.latent_channels,))
        if model.config.guidance_embeds:
            raise CheckpointError(
                "the Flux2Transformer2DModel has guidance_embeds, as FLUX.2 [dev] has; this version knows "
                "FLUX.2 [klein], which has not: use a checkpoint of Flux2KleinPipeline"
            )
        self._passed = PassedCondition(self.timestep_embedding)

    def predict(self, latents: Tensor, timesteps: Tensor, condition: Tensor | None, prompt: Conditioning) -> Tensor:
        """Call the transformer with latents [B, 128, H, W], one token each, and timesteps of sigma * 1000.

        Text token n has the position (0, 0, 0, n), an image token (0, row, column, 0). Tokens of references follow
        those of the image; what the transformer returns for them is left out.
        """
        sizes = (*latents.shape[-2:], prompt.prompt_embeds.shape[1])
        rows, columns, text = (torch.arange(size, device=latents.device) for size in sizes)
        zero = torch.zeros_like(rows[:1])
        tokens = latents.flatten(2).transpose(1, 2)
        positions = torch.cartesian_prod(zero, rows, columns, zero)
        if prompt.reference_tokens is not None and prompt.reference_positions is not None:
            tokens = torch.cat([tokens, prompt.reference_tokens], dim=1)
            positions = torch.cat([positions, prompt.reference_positions[0]])
        output: Tensor
        with self._passed.during(condition):
            output = self.model(
                hidden_states=tokens,
                encoder_hidden_states=prompt.prompt_embeds,
                timestep=timesteps / 1000,  # the transformer multiplies by 1000 again
                img_ids=positions,
                txt_ids=torch.cartesian_prod(zero, zero, zero, text),
                return_dict=False,
            )[0]
        if prompt.reference_tokens is not None:
            output = output[:, : -prompt.reference_tokens.shape[1]]
        return output.transpose(1, 2).reshape(latents.shape)

    def optional_inputs(self) -> Mapping[str, tuple[DType, Sequence[int | str]]]:
        tokens, positions = REFERENCES
        return {tokens: ("float32", ("references", self.latent_channels)), positions: ("int64", ("references", 4))}


class Flux2Decoder(DecoderModule):
    """The denoiser's latents [B, 4C, h, w] -> the VAE's latents [B, C, 2h, 2w] -> pixels."""

    def to_vae(self, latents: Tensor) -> Tensor:
        """Undo the VAE's batch norm, which has running statistics for 4C channels, then unpatchify."""
        mean, std = _batch_norm(self.vae, latents)
        return pixel_shuffle(latents * std + mean, PATCH_SIZE)

    @property
    def channels(self) -> int:
        return super().channels * PATCH_SIZE**2


@final
class Flux2(Family):
    """Family of `Flux2KleinPipeline`."""

    name = "flux2"
    pipelines = ("Flux2KleinPipeline",)
    denoiser_class = "Flux2Transformer2DModel"
    adapter = Flux2Denoiser
    # The text stream has projections of its own; blocks of one stream have one projection for attention and MLP.
    lora_targets = (*ATTENTION_PROJECTIONS, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "to_qkv_mlp_proj")
    vae_classes = ("AutoencoderKLFlux2",)
    decoder = Flux2Decoder
    references = ReferenceRule(max_pictures=4, max_pixels=1024 * 1024, multiple=16, min_side=64, max_ratio=8)

    def latent_channels(self, vae: Mapping[str, Any]) -> int | None:
        channels = super().latent_channels(vae)
        return None if channels is None else channels * PATCH_SIZE**2

    def spatial_compression(self, vae: Mapping[str, Any]) -> int:
        return super().spatial_compression(vae) * PATCH_SIZE

    def encode_distribution(self, vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        latents, spread = (pixel_unshuffle(part, PATCH_SIZE) for part in encoded_by(vae, pixels))
        mean, std = _batch_norm(vae, latents)
        return (latents - mean) / std, spread / std

    def max_tokens(self, encoders: TextEncoders) -> int:
        return 512

    def encode_prompts(self, prompts: list[str], encoders: TextEncoders) -> Conditioning:
        """Encode prompts in Qwen's chat template, padded to 512 tokens: hidden states 9, 18 and 27, joined along D."""
        embeds, _ = encoders.pipeline.encode_prompt(prompts, device=encoders.device)
        return Conditioning(embeds)

    def reference_tokens(self, latents: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Picture n, from 1, has the positions (10 n, row, column, 0)."""
        tokens = torch.cat([one.flatten(1).T for one in latents])
        positions = [
            torch.cartesian_prod(torch.tensor([REFERENCE_STEP * n]), *map(torch.arange, one.shape[1:]), torch.arange(1))
            for n, one in enumerate(latents, start=1)
        ]
        return tokens[None], torch.cat(positions)[None].to(tokens.device)

    def replacement(self, part: nn.Module) -> tuple[str, Any] | None:
        from diffusers.models.transformers.transformer_flux2 import Flux2PosEmbed

        return ("forward", MethodType(rotary_embedding, part)) if isinstance(part, Flux2PosEmbed) else None


def _batch_norm(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the running mean and standard deviation of the VAE's latents, [4C, 1, 1] each."""
    mean, var = vae.bn.running_mean, vae.bn.running_var
    std = torch.sqrt(var + vae.config.batch_norm_eps)
    return mean.to(like)[:, None, None], std.to(like)[:, None, None]
