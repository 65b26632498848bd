"""The programs a picture passes through, as modules: tensors in, one tensor out.

Backends run them and exporters compile them; what goes in and out is said once, by an `Interface`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tdm_runtime.backends.interface import Interface, TensorSpec
from tdm_runtime.families.interfaces import denoiser_interface

if TYPE_CHECKING:
    from diffusers import AutoencoderKLCogVideoX
from typing import TYPE_CHECKING

from tdm_runtime.backends.interface import ComponentName

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, AutoencoderTiny
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
            from tdm_runtime.families.unet import UNetDenoiser

            unet = UNetDenoiser(checkpoint.load_unet())
            tokens, width = checkpoint.load_tokenizer().max_tokens, unet.model.config.cross_attention_dim
            return unet, denoiser_interface((unet.latent_channels, "height", "width"), (tokens, width))
    return module, module.interface()


class VideoDecoderModule(nn.Module):
    """Video latents, as the denoiser has them, -> the frames' pixels."""

    def __init__(self, vae: AutoencoderKLCogVideoX) -> None:
        super().__init__()
        self.vae = vae.eval()
        self._scaling_factor = float(vae.config.scaling_factor)

    def forward(self, latents: Tensor) -> Tensor:
        """Return uint8 [B, frames, H, W, 3] for latents [B, C, F, h, w]."""
        pixels = self.vae.decode(latents / self._scaling_factor, return_dict=False)[0].float()
        levels: Tensor = (pixels.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)
        return levels.permute(0, 2, 3, 4, 1).contiguous()

    def interface(self, frames: int) -> Interface:
        """F is fixed: the decoder goes through the latent frames in a Python loop, two at a time."""
        config = self.vae.config
        ratio = config.temporal_compression_ratio
        num_frames = (frames - 1) * ratio + 1 if frames % 2 else frames * ratio
        return Interface(
            (TensorSpec("latents", "float32", ("batch", config.latent_channels, frames, "height", "width")),),
            TensorSpec("pixels", "uint8", ("batch", num_frames, "height_px", "width_px", 3)),
        )
