"""A checkpoint in memory, ready to run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tdm_runtime.backends import Backend
from tdm_runtime.checkpoint.manifest import PictureParity
from tdm_runtime.checkpoint.recipe import Recipe
from tdm_runtime.errors import InvalidRequestError
from tdm_runtime.model.decoder import Decoder
from tdm_runtime.model.text_encoder import TextEncoder
from tdm_runtime.params import DecoderName, SamplingParams
from tdm_runtime.scheduling.cost_model import Kind


@dataclass(frozen=True)
class LoadedModel:
    """The parts a picture passes through."""

    recipe: Recipe
    digest: str
    """sha256 of the checkpoint's recipe and, through it, of its weights."""
    backend: str
    """What runs it, as "openvino bf16"."""
    text_encoder: TextEncoder
    denoiser: Backend
    decoders: Mapping[DecoderName, Decoder]
    """"full" and, where the checkpoint has one, "tiny"."""
    latent_channels: int
    parity: Mapping[int, PictureParity]
    """Step count K -> how close its pictures come to torch float32; empty where nobody measured."""
    choice: str = ""
    """Why this backend, where it was chosen by measuring."""
    base: str | None = None
    """Of a LoRA: the model whose weights it changes, and whose other parts it shares."""
    adapter: int | None = None
    """Of a LoRA: its number among those that share the denoiser (`AdapterBank`)."""

    @property
    def name(self) -> str:
        """What requests call it."""
        return self.recipe.name

    def kind(self, stage: str, shape: tuple[int, ...] = ()) -> Kind:
        """A call of this model; those of one kind can be one call. LoRAs of one base share theirs."""
        if self.base is None:
            return Kind(stage, shape, self.name)
        return Kind(stage, shape, self.base if stage.startswith("decode") else f"{self.base} with LoRAs")

    def latent_shape(self, params: SamplingParams) -> tuple[int, int, int]:
        """[C, H, W] of a request's latents."""
        downscale = self.decoders["full"].downscale
        return (self.latent_channels, params.height // downscale, params.width // downscale)

    @property
    def preview_decoder(self) -> DecoderName:
        """The cheapest decoder there is."""
        return "tiny" if "tiny" in self.decoders else "full"

    @property
    def is_batch_invariant(self) -> bool:
        """Whether a picture has the same bits alone and in any company."""
        backends = (self.text_encoder.backend, self.denoiser, *(d.backend for d in self.decoders.values()))
        return all(backend.is_batch_invariant for backend in backends)

    def check(self, params: SamplingParams) -> None:
        """Check what a request asks of this model.

        Raises:
            InvalidRequestError: a step count, size or decoder that it does not have.
        """
        params.check_against(self.recipe)
        if params.decoder not in self.decoders:
            raise InvalidRequestError(
                f"decoder is {params.decoder!r}; {self.name} has {', '.join(self.decoders)}", param="decoder"
            )


def adapter_inputs(models: Sequence[LoadedModel]) -> tuple[Tensor, ...]:
    """What the denoiser that some samples' models share reads beside its usual inputs: of LoRAs, their numbers, [B]."""
    numbers = [model.adapter for model in models if model.adapter is not None]
    return (torch.tensor(numbers, device=models[0].denoiser.device),) if numbers else ()
