"""Components of a checkpoint as modules: tensors in, one tensor out.

Backends run them and exporters compile them. An `Interface` states what goes in and out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tdm_runtime.backends.interface import ComponentName, Interface, TensorSpec
from tdm_runtime.families import DecoderModule
from tdm_runtime.families.latent_space import ClipDecoderModule, ClipPart, EncoderModule

if TYPE_CHECKING:
    from transformers import CLIPTextModel

    from tdm_runtime.checkpoint.folder import Checkpoint


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
        """Return what `forward` is called with. L is fixed, because prompts are padded to it."""
        tokens, width = self.model.config.max_position_embeddings, self.model.config.hidden_size
        return Interface(
            (TensorSpec("input_ids", "int64", ("batch", tokens)),),
            TensorSpec("prompt_embeds", "float32", ("batch", tokens, width)),
        )


def component_names(checkpoint: Checkpoint) -> tuple[ComponentName, ...]:
    """Return the components of a checkpoint that any backend runs, in the order that a picture passes through them."""
    text: tuple[ComponentName, ...] = ("text_encoder",) if checkpoint.has_clip_alone else ()
    picture: tuple[ComponentName, ...] = () if checkpoint.family.makes_clips else ("encoder",)
    tiny: tuple[ComponentName, ...] = ("tiny_decoder",) if checkpoint.has_tiny_vae else ()
    return (*text, *picture, "denoiser", "decoder", *tiny)


def program_names(checkpoint: Checkpoint, name: ComponentName) -> tuple[str, ...]:
    """Return the programs that a component is compiled to: one, or a decoder of clips one for each kind of part."""
    decoder = checkpoint.family.decoder
    if name.endswith("decoder") and issubclass(decoder, ClipDecoderModule):
        return tuple(f"{name}_{kind.name}" for kind in decoder.kinds)
    return (name,)


def load_programs(
    checkpoint: Checkpoint, name: ComponentName, dtype: torch.dtype = torch.float32
) -> Mapping[str, tuple[nn.Module, Interface]]:
    """Load one component as modules to compile, by `program_names`; they share their weights.

    Raises:
        CheckpointError: see `load_component`.
    """
    module, interface = load_component(checkpoint, name, dtype)
    if not isinstance(module, ClipDecoderModule):
        return {name: (module, replace(interface, optional_inputs=()))}
    parts = [ClipPart(module, kind) for kind in module.kinds]
    return {f"{name}_{part.kind.name}": (part, part.interface()) for part in parts}


def load_component(
    checkpoint: Checkpoint, name: ComponentName, dtype: torch.dtype = torch.float32, vae: Any = None
) -> tuple[nn.Module, Interface]:
    """Load one component's module in eval mode, and its interface.

    Args:
        dtype: of the weights. Where LoRAs are merged into them they are float32.
        vae: the checkpoint's VAE, where it is in memory already.

    Raises:
        CheckpointError: the checkpoint has no such component, or it cannot be loaded.
    """
    module: TextEncoderModule | EncoderModule | DecoderModule
    match name:
        case "text_encoder":
            module = TextEncoderModule(checkpoint.load_text_model(dtype))
        case "encoder":
            module = EncoderModule(checkpoint.family, vae or checkpoint.load_vae(dtype), checkpoint.geometry)
        case "decoder":
            module = checkpoint.family.decoder(vae or checkpoint.load_vae(dtype))
        case "tiny_decoder":
            module = checkpoint.family.decoder(checkpoint.load_tiny_vae(dtype))
        case "denoiser":
            denoiser = checkpoint.load_denoiser(dtype)
            of_clip = checkpoint.load_tokenizer().max_tokens if checkpoint.has_clip_alone else None
            return denoiser, denoiser.interface(of_clip or denoiser.fixed_tokens or "tokens")
    return module, module.interface()
