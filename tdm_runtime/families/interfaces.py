"""The interface of each family's denoiser."""

from __future__ import annotations

from collections.abc import Sequence

from tdm_runtime.backends.interface import DType, Interface, TensorSpec
from tdm_runtime.errors import CheckpointError
from tdm_runtime.families import Denoiser
from tdm_runtime.families.cogvideox import CogVideoXDenoiser
from tdm_runtime.families.pixart import PixArtDenoiser
from tdm_runtime.families.sd3 import SD3Denoiser


def denoiser_interface(
    latents: Sequence[int | str], prompt_embeds: Sequence[int | str], **extra: tuple[DType, Sequence[int | str]]
) -> Interface:
    """The interface of `Denoiser.forward`.

    Args:
        latents: shape of one sample, [C, "height", "width"] or, of a video, [C, "frames", "height", "width"].
        prompt_embeds: shape of one sample, [L, D]; L may be "tokens".
        extra: what else the family reads, by its name in `Conditioning`: dtype and shape of one sample.
    """

    def batched(name: str, dtype: DType, shape: Sequence[int | str]) -> TensorSpec:
        return TensorSpec(name, dtype, ("batch", *shape))

    optional = (batched(name, *extra[name]) for name in _CONDITIONING_ORDER if name in extra)
    return Interface(
        (
            batched("latents", "float32", latents),
            batched("timesteps", "float32", ()),
            batched("step_counts", "int64", ()),
            batched("prompt_embeds", "float32", prompt_embeds),
            *optional,
        ),
        batched("model_output", "float32", latents),
    )


_CONDITIONING_ORDER = ("pooled_prompt_embeds", "attention_mask", "time_ids")


TIME_IDS = 6
"""Numbers of a picture's size and crop that SDXL reads."""


def interface_of(denoiser: Denoiser, tokens: int | str, text_dim: int) -> Interface:
    """The interface of a family's denoiser: batch, height, width and frames may differ from call to call.

    Args:
        tokens: L of the prompt embeddings; "tokens" where it may differ from call to call.
        text_dim: D of the prompt embeddings.

    Raises:
        CheckpointError: the model reads a fixed number of tokens, and another one was given.
    """
    config = denoiser.model.config
    is_video = isinstance(denoiser, CogVideoXDenoiser)
    if is_video and not config.use_rotary_positional_embeddings and tokens != config.max_text_seq_length:
        raise CheckpointError(
            f"tokens is {tokens!r}; without rotary embeddings CogVideoX reads exactly {config.max_text_seq_length}"
        )
    extra: dict[str, tuple[DType, tuple[int | str, ...]]] = {}
    if isinstance(denoiser, PixArtDenoiser):
        extra["attention_mask"] = ("int64", (tokens,))
    elif isinstance(denoiser, SD3Denoiser):
        extra["pooled_prompt_embeds"] = ("float32", (config.pooled_projection_dim,))
    elif config.get("addition_embed_type") == "text_time":
        pooled_dim = config.projection_class_embeddings_input_dim - TIME_IDS * config.addition_time_embed_dim
        extra["pooled_prompt_embeds"] = ("float32", (pooled_dim,))
        extra["time_ids"] = ("float32", (TIME_IDS,))
    frames = ("frames",) if is_video else ()
    return denoiser_interface((denoiser.latent_channels, *frames, "height", "width"), (tokens, text_dim), **extra)
