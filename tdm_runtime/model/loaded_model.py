"""A checkpoint in memory, ready to run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from tdm_runtime.backends import Backend
from tdm_runtime.checkpoint.manifest import PictureParity
from tdm_runtime.checkpoint.recipe import Recipe
from tdm_runtime.errors import InvalidRequestError
from tdm_runtime.families.call import REFERENCES, denoiser_arguments
from tdm_runtime.families.conditioning import Conditioning
from tdm_runtime.families.family import Family
from tdm_runtime.families.latent_space import LatentGeometry
from tdm_runtime.families.prompt_weights import BREAK
from tdm_runtime.model.decoder import Decoder
from tdm_runtime.model.encoder import PictureEncoder
from tdm_runtime.model.text_encoder import PromptEmbedding, PromptKey, TextEncoder
from tdm_runtime.params import DecoderName, SamplingParams
from tdm_runtime.sampling.known_picture import KnownPicture
from tdm_runtime.sampling.noise import SeedNoise
from tdm_runtime.sampling.solvers import DRAWS_A_STEP
from tdm_runtime.sampling.step_table import StepTable


class Start(NamedTuple):
    """Where the sampling of a request starts."""

    noise: SeedNoise
    initial: Tensor
    """Unit normal noise that the latents start from, [C, H, W] or [C, F, H, W]."""
    known: KnownPicture | None = None
    """Given picture of an edit."""

    def latents(self, table: StepTable) -> Tensor:
        """Return the latents that the first step takes."""
        return table.initial_scale * self.initial if self.known is None else self.known.start(table)


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint with a backend for each component."""

    recipe: Recipe
    digest: str
    """sha256 of the checkpoint's recipe and, through it, of its weights."""
    backend: str
    """Name of backend and precision, such as "openvino bf16"."""
    text_encoder: TextEncoder
    family: Family
    denoiser: Backend
    denoiser_inputs: tuple[str, ...]
    """Names of the denoiser's inputs, in order."""
    decoders: Mapping[DecoderName, Decoder]
    """"full" and, where the checkpoint has one, "tiny"."""
    encoder: PictureEncoder | None
    """Encoder of given pictures; None for models that make clips."""
    geometry: LatentGeometry
    """Rule for the shape of the latents."""
    parity: Mapping[int, PictureParity]
    """Parity of the pictures with torch float32, by step count K; empty where it was not measured."""
    recipe_source: str = ""
    """Where the recipe comes from: a file of the folder, or the scheduler that implies it."""
    threads: int | None = None
    """CPU threads of a denoiser call; None where the backend or the caller decides."""
    choice: str = ""
    """Why this backend was chosen; empty where the configuration named it."""
    base: str | None = None
    """Name of the base of a LoRA; None for a model of its own."""
    adapter: int | None = None
    """Number of a LoRA in the `AdapterBank` of its base; None for a model of its own."""
    max_chunks: int = 1
    """Most chunks of a prompt that the denoiser reads, see `families.prompt_weights`."""

    @property
    def name(self) -> str:
        """Name that requests use."""
        return self.recipe.name

    def latent_shape(self, params: SamplingParams) -> tuple[int, ...]:
        """Shape of a request's latents: [C, H, W], of a clip [C, F, H, W]."""
        return self.geometry.latent_shape(params.width, params.height, params.frames or 1)

    @property
    def reads_references(self) -> bool:
        """Whether its backend reads the reference pictures that the family takes."""
        return set(REFERENCES) <= set(self.denoiser_inputs)

    def reference_shapes(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        """Shape of the latents of each reference picture, [C, h, w]."""
        return tuple(self.geometry.latent_shape(*one.size, 1) for one in params.references)

    def noise(self, params: SamplingParams, first_draw: int = 0, step_draw: int = 1) -> SeedNoise:
        """Return the noise of a request, in the shape of its latents. Draws are those of `SeedNoise`."""
        return SeedNoise(
            params.seed,
            self.latent_shape(params),
            params.noise_angle,
            frames_first=self.geometry.draws_frames_first,
            draws_a_step=DRAWS_A_STEP.get(self.recipe.solver, 1),
            first_draw=first_draw,
            step_draw=step_draw,
        )

    def start(self, params: SamplingParams) -> Start:
        """Return where the sampling of a request starts, on the device of the denoiser.

        The generator of an edit draws as stock pipelines draw: the picture's latents from their distribution, where the
        autoencoder has one, then the initial latents. With a mask they also encode the picture without what the mask
        covers, which no model here reads, before they draw the noise of the first step.
        """
        device, edit = self.denoiser.device, params.edit
        if edit is None:
            noise = self.noise(params)
            return Start(noise, noise.initial().to(device))
        assert self.encoder is not None, "models that make pictures have an encoder"
        (encoded,) = self.encoder.encode_all([edit])
        latents = encoded.mean.to(device)
        if encoded.is_sampled:
            latents = latents + encoded.std.to(device) * self.noise(params).initial().to(device)
            noise = self.noise(params, 1, 1 if edit.mask is None else 2)
        else:
            noise = self.noise(params)
        kept = edit.kept_latents(*latents.shape[-2:])
        initial, is_start = noise.initial().to(device), edit.mask is None or edit.strength < 1.0
        known = KnownPicture(latents, initial, None if kept is None else kept.to(device), is_start)
        return Start(noise, initial, known)

    def step_table(self, params: SamplingParams) -> StepTable:
        """Return the steps that a request takes."""
        return self.recipe.step_table(params.num_inference_steps, params.width, params.height, params.num_steps)

    def lora_factor(self, params: SamplingParams) -> float:
        """Factor on what the model's LoRA adds: the scale of a request, or else of the LoRA; 1 without a LoRA."""
        scale = self.recipe.lora_scale if params.lora_scale is None else params.lora_scale
        return 1.0 if scale is None else scale

    @property
    def preview_decoder(self) -> DecoderName:
        """Name of the cheapest decoder."""
        return "tiny" if "tiny" in self.decoders else "full"

    @property
    def is_batch_invariant(self) -> bool:
        """Whether a picture has the same bits alone and in any batch."""
        backends = (self.denoiser, *(d.backend for d in self.decoders.values()))
        return self.text_encoder.encoder.is_batch_invariant and all(b.is_batch_invariant for b in backends)

    def conditioning(self, prompt: PromptEmbedding, params: SamplingParams) -> Conditioning:
        """Return what the denoiser reads about a request beside latents, timesteps and K: a batch of one."""
        found, device = prompt.conditioning, self.denoiser.device
        if (time_ids := self.family.time_ids(params.width, params.height)) is not None:
            found = replace(found, time_ids=torch.tensor([time_ids], device=device))
        scale = self.recipe.guidance_scale if params.guidance_scale is None else params.guidance_scale
        if scale is not None:
            found = replace(found, guidance=torch.tensor([float(scale)], device=device))
        if params.references:
            assert self.encoder is not None, "models that make pictures have an encoder"
            latents = [one.mean.to(device) for one in self.encoder.encode_all(params.references)]
            tokens, positions = self.family.reference_tokens(latents)
            found = replace(found, reference_tokens=tokens, reference_positions=positions)
        return found

    def embedding(self, params: SamplingParams) -> PromptEmbedding:
        """Return the embedding of a request's prompt, from the cache if it is there."""
        return self.text_encoder.encode_all([self.prompt_key(params)])[0]

    def prompt_key(self, params: SamplingParams) -> PromptKey:
        """Return what the embedding of a request's prompt depends on."""
        return self.text_encoder.key(params.prompt, self.lora_factor(params), params.prompt_syntax, self.max_chunks)

    def check(self, params: SamplingParams) -> None:
        """Check that this model serves a request.

        Raises:
            InvalidRequestError: a step count, size, decoder, prompt syntax or reference pictures that it does not have.
        """
        params.check_against(self.recipe)
        if params.references and not self.reads_references:
            raise InvalidRequestError(
                f"the references of {self.name} are read by torch, and it runs on {self.backend}: send strength to "
                "start from the picture, or run the model with --backend torch",
                param="image",
            )
        if params.decoder not in self.decoders:
            raise InvalidRequestError(
                f"decoder is {params.decoder!r}; {self.name} has {', '.join(self.decoders)}", param="decoder"
            )
        if params.prompt_syntax != "plain":
            self._check_syntax(params)

    def _check_syntax(self, params: SamplingParams) -> None:
        if not self.family.reads_weights:
            raise InvalidRequestError(
                f"prompt_syntax is {params.prompt_syntax!r}; {self.name} is of the family {self.family.name}, whose "
                "text encoders have no usual rule for weights: leave it out, and the prompt is read as plain words",
                param="prompt_syntax",
            )
        if self.max_chunks == 1 and BREAK.search(params.prompt):
            raise InvalidRequestError(
                f"the prompt has BREAK, which needs a denoiser that reads more than one chunk of tokens; {self.name} "
                f"on {self.backend} reads one: leave BREAK out",
                param="prompt",
            )


def denoise(
    models: Sequence[LoadedModel],
    latents: Tensor,
    timesteps: Tensor,
    step_counts: Tensor | None,
    prompt: Conditioning,
    lora_factors: Sequence[float] = (),
) -> Tensor:
    """Call the denoiser that the models of a batch share.

    Args:
        models: The model of each sample: B times the same, or LoRAs of one base.
        latents, timesteps, step_counts, prompt: see `denoiser_arguments`.
        lora_factors: `LoadedModel.lora_factor` of each sample; 1 each where left out.

    Returns:
        The model output, same shape as latents.
    """
    denoiser = models[0].denoiser
    numbers = [model.adapter for model in models if model.adapter is not None]
    names = models[0].denoiser_inputs
    if not numbers:
        return denoiser(*denoiser_arguments(names, latents, timesteps, step_counts, prompt))
    adapters = torch.tensor(numbers, device=denoiser.device)
    factors = torch.tensor(lora_factors or [1.0] * len(numbers), device=denoiser.device)
    return denoiser(*denoiser_arguments(names, latents, timesteps, step_counts, prompt, adapters, factors))
