"""The programs a picture passes through, as modules: tensors in, one tensor out.

Backends run them and exporters compile them; what goes in and out is said once, by an `Interface`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, AutoencoderTiny
    from transformers import CLIPTextModel

    from tdm_runtime.checkpoint import Checkpoint

ComponentName = Literal["text_encoder", "denoiser", "decoder", "tiny_decoder"]
DType = Literal["float32", "int64", "uint8"]


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of an interface."""

    name: str
    dtype: DType
    shape: tuple[int | str, ...]
    """A number is fixed; a name ("batch", "height", ...) may differ from call to call."""

    def resolve(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape with its names replaced by sizes."""
        return tuple(size if isinstance(size, int) else sizes[size] for size in self.shape)


@dataclass(frozen=True)
class Interface:
    """What a component is called with and what it returns. The first axis of every tensor is the batch."""

    inputs: tuple[TensorSpec, ...]
    output: TensorSpec

    @property
    def size_names(self) -> tuple[str, ...]:
        """The sizes that may differ from call to call, each once."""
        names = [size for spec in self.inputs for size in spec.shape if isinstance(size, str)]
        return tuple(dict.fromkeys(names))

    @property
    def kept_float32(self) -> frozenset[str]:
        """Inputs that stay float32 in any arithmetic: what becomes angles, and what SDXL joins to them."""
        names = {spec.name for spec in self.inputs}
        joined = {"pooled_prompt_embeds"} if "time_ids" in names else set()
        return frozenset(names & ({"timesteps", "time_ids"} | joined))

    def random_inputs(self, sizes: Mapping[str, int], generator: torch.Generator) -> tuple[Tensor, ...]:
        """Inputs such as a request brings: normal latents and embeddings, timesteps in [1, 999], K in [1, 4]."""
        return tuple(_random(spec, spec.resolve(sizes), generator) for spec in self.inputs)


def _random(spec: TensorSpec, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    match spec.name:
        case "timesteps":
            return torch.randint(1, 1000, tuple(shape), generator=generator).float()
        case "step_counts":
            return torch.randint(1, 5, tuple(shape), generator=generator)
        case "input_ids":
            return torch.randint(0, 100, tuple(shape), generator=generator)
        case "attention_mask":
            lengths = torch.randint(1, shape[1] + 1, (shape[0], 1), generator=generator)
            return (torch.arange(shape[1]) < lengths).long()
        case "time_ids":
            return torch.tensor([[512.0, 512.0, 0.0, 0.0, 512.0, 512.0]]).repeat(shape[0], 1)
    return torch.randn(tuple(shape), generator=generator)


class TextEncoderModule(nn.Module):
    """Token ids -> prompt embeddings."""

    def __init__(self, model: CLIPTextModel) -> None:
        super().__init__()
        self.model = model.eval()

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return prompt_embeds [B, L, D] for int64 token ids [B, L]."""
        output: Tensor = self.model(input_ids).last_hidden_state
        return output

    def interface(self) -> Interface:
        """L is fixed: prompts are padded to it."""
        tokens, width = self.model.config.max_position_embeddings, self.model.config.hidden_size
        return Interface(
            (TensorSpec("input_ids", "int64", ("batch", tokens)),),
            TensorSpec("prompt_embeds", "float32", ("batch", tokens, width)),
        )


class DecoderModule(nn.Module):
    """Latents, as the denoiser has them, -> pixels as picture files have them."""

    def __init__(self, vae: AutoencoderKL | AutoencoderTiny) -> None:
        super().__init__()
        self.vae = vae.eval()
        self._scaling_factor = float(vae.config.scaling_factor)
        self._shift_factor = float(vae.config.get("shift_factor") or 0.0)

    def forward(self, latents: Tensor) -> Tensor:
        """Return uint8 [B, H, W, 3] for latents [B, C, h, w]."""
        pixels = self.vae.decode(latents / self._scaling_factor + self._shift_factor, return_dict=False)[0].float()
        levels: Tensor = (pixels.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)
        return levels.permute(0, 2, 3, 1).contiguous()

    def interface(self) -> Interface:
        channels = self.vae.config.latent_channels
        return Interface(
            (TensorSpec("latents", "float32", ("batch", channels, "height", "width")),),
            TensorSpec("pixels", "uint8", ("batch", "height_px", "width_px", 3)),
        )


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


def component_names(checkpoint: Checkpoint) -> tuple[ComponentName, ...]:
    """The components a checkpoint has, in the order that a picture passes through them."""
    always: tuple[ComponentName, ...] = ("text_encoder", "denoiser", "decoder")
    return (*always, "tiny_decoder") if checkpoint.has_tiny_vae else always


def load_component(checkpoint: Checkpoint, name: ComponentName) -> tuple[nn.Module, Interface]:
    """Load one component's module, float32 and in eval mode, and what it is called with.

    Raises:
        CheckpointError: the checkpoint has no such component, or it cannot be loaded.
    """
    module: TextEncoderModule | DecoderModule
    match name:
        case "text_encoder":
            module = TextEncoderModule(checkpoint.load_text_model())
        case "decoder":
            module = DecoderModule(checkpoint.load_vae())
        case "tiny_decoder":
            module = DecoderModule(checkpoint.load_tiny_vae())
        case "denoiser":
            from tdm_runtime.models.unet import UNetDenoiser

            unet = UNetDenoiser(checkpoint.load_unet())
            tokens, width = checkpoint.load_tokenizer().max_tokens, unet.model.config.cross_attention_dim
            return unet, denoiser_interface((unet.latent_channels, "height", "width"), (tokens, width))
    return module, module.interface()
