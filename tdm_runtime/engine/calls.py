"""Calls of the model: a batch of samples in, one outcome for each sample out. Nothing here knows the queue."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from tdm_runtime.engine.sample import Sample
from tdm_runtime.errors import GenerationError, NotFiniteError, TDMError
from tdm_runtime.model.decoder import Pixels
from tdm_runtime.model.loaded_model import denoise
from tdm_runtime.model.text_encoder import stacked
from tdm_runtime.params import DecoderName
from tdm_runtime.sampling.sampler import StepRow, apply_step, gather_rows

logger = logging.getLogger(__name__)

Stepped = tuple[Tensor, Tensor]
"""Next latents and denoised estimate of a sample, [C, H, W] or [C, F, H, W] each."""
Result = TypeVar("Result")


class ModelCalls:
    """Runs calls. A batch that fails is split in halves and tried again, until only the sample at fault fails."""

    def __init__(self, on_out_of_memory: Callable[[int], None]) -> None:
        """
        Args:
            on_out_of_memory: Called with the number of samples of a call that did not fit into memory.
        """
        self._on_out_of_memory = on_out_of_memory

    def encode(self, samples: Sequence[Sample]) -> list[TDMError | None]:
        """Encode the prompts of samples of one lane."""
        return self._isolated(self._encoded, samples)

    def encode_pictures(self, samples: Sequence[Sample]) -> list[TDMError | None]:
        """Encode the given pictures of samples of one lane. They stay in the cache of the encoder."""
        return self._isolated(_pictures_encoded, samples)

    def prepare(self, samples: Sequence[Sample]) -> list[TDMError | None]:
        """Draw the noise of samples of one lane, and take the prompts and pictures that are cached."""
        return self._isolated(self._prepared, samples)

    def denoise(self, samples: Sequence[Sample]) -> list[Stepped | TDMError]:
        """Take one step of each sample; step counts and solvers may differ."""
        return self._isolated(self._stepped, samples)

    def decode(self, samples: Sequence[Sample]) -> list[Pixels | TDMError | None]:
        """Decode samples of one latent shape with one decoder, or make the next call of a sample whose decode has more.

        Returns:
            Pixels; None for a sample whose decode goes on.
        """
        name = samples[0].params.decoder
        if samples[0].decodes_left > 1 or samples[0].decoding is not None:
            return self._isolated(_decoded_further, samples)
        return self._isolated(lambda part: _decoded(part[0], name, [s.latents for s in part]), samples)

    def preview(self, sample: Sample) -> Pixels | TDMError:
        """Decode the denoised estimate of a sample's latest step; of a clip its first frame."""
        decoder = sample.model.decoders[sample.model.preview_decoder]
        return self._isolated(lambda part: list(decoder.preview(_stacked([s.denoised for s in part]))), [sample])[0]

    def _isolated(
        self, call: Callable[[Sequence[Sample]], list[Result | TDMError]], samples: Sequence[Sample]
    ) -> list[Result | TDMError]:
        try:
            return call(samples)
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError | MemoryError):
                self._on_out_of_memory(len(samples))
                torch.cuda.empty_cache()
            if len(samples) == 1:
                return [_as_tdm_error(error)]
            logger.warning("a call of %d samples failed (%s); trying its halves", len(samples), type(error).__name__)
            middle = len(samples) // 2
            return self._isolated(call, samples[:middle]) + self._isolated(call, samples[middle:])

    def _encoded(self, samples: Sequence[Sample]) -> list[TDMError | None]:
        for text_encoder in {sample.model.text_encoder for sample in samples}:  # a LoRA may have its own
            readers = [sample for sample in samples if sample.model.text_encoder is text_encoder]
            prompts = text_encoder.encode_all([sample.model.prompt_key(sample.params) for sample in readers])
            for sample, prompt in zip(readers, prompts, strict=True):
                sample.prompt = prompt
        return [None] * len(samples)

    def _prepared(self, samples: Sequence[Sample]) -> list[TDMError | None]:
        self._encoded([sample for sample in samples if sample.prompt is None])
        for sample in samples:
            assert sample.prompt is not None
            sample.conditioning = sample.model.conditioning(sample.prompt, sample.params)
            start = sample.model.start(sample.params)
            sample.noise, sample.known = start.noise, start.known
            sample.latents = start.latents(sample.table)
            sample.denoised_before = sample.denoised = torch.zeros_like(sample.latents)
        return [None] * len(samples)

    @torch.inference_mode()
    def _stepped(self, samples: Sequence[Sample]) -> list[Stepped | TDMError]:
        """Make one denoiser call and one fused solver update."""
        device = samples[0].model.denoiser.device  # samples of one lane share their denoiser
        steps = [(s.table, s.step_index) for s in samples]
        rows = gather_rows(steps, device)
        step_counts = torch.from_numpy(np.array([s.params.num_inference_steps for s in samples])).to(device)
        prompt = stacked([s.conditioning for s in samples if s.conditioning is not None])
        latents = _stacked([s.latents for s in samples])
        needs_previous = any(table.c[step_index] for table, step_index in steps)
        previous = _stacked([s.denoised for s in samples]) if needs_previous else None
        factors = [s.model.lora_factor(s.params) for s in samples]
        needs_before = any(table.e[step_index] for table, step_index in steps)
        before = _stacked([s.denoised_before for s in samples]) if needs_before else None
        model_output = denoise([s.model for s in samples], latents, rows[:, 0], step_counts, prompt, factors)
        noise = _fresh_noise(samples, steps, device)
        latents, denoised = apply_step(rows, latents, model_output, previous, noise, before)
        sums = latents.flatten(1).sum(1).tolist()
        return [
            (sample.after_step(latents[n]), denoised[n])
            if math.isfinite(sums[n])
            else NotFiniteError("the model produced NaN or infinity; no picture was made")
            for n, sample in enumerate(samples)
        ]


@torch.inference_mode()
def _pictures_encoded(samples: Sequence[Sample]) -> list[TDMError | None]:
    encoder = samples[0].model.encoder  # samples of one lane share their base
    assert encoder is not None
    encoder.encode_all([picture for sample in samples for picture in sample.params.given_pictures])
    return [None] * len(samples)


def _decoded(sample: Sample, decoder: DecoderName, latents: Sequence[Tensor | None]) -> list[Pixels | TDMError | None]:
    return list(sample.model.decoders[decoder].decode(_stacked(latents)))


def _decoded_further(samples: Sequence[Sample]) -> list[Pixels | TDMError | None]:
    """Make the next call of decodes that take more than one."""
    for sample in samples:
        if sample.decoding is None:
            assert sample.latents is not None
            sample.decoding = sample.model.decoders[sample.params.decoder].steps(sample.latents)
    return [next(sample.decoding) for sample in samples if sample.decoding is not None]


def _fresh_noise(samples: Sequence[Sample], steps: Sequence[StepRow], device: torch.device) -> Tensor | None:
    """Return the noise of each sample's step, [B, ...]; None if no step takes any.

    Samples whose step takes none have their latents there: anything finite will do, and nothing is drawn or copied.
    """
    takes_noise = [bool(table.d[step_index]) for table, step_index in steps]
    if not any(takes_noise):
        return None
    return _stacked(
        [
            s.noise.of_step(s.step_index).to(device) if takes and s.noise is not None else s.latents
            for s, takes in zip(samples, takes_noise, strict=True)
        ]
    )


def _stacked(tensors: Sequence[Tensor | None]) -> Tensor:
    """Stack tensors to [B, ...]. A single tensor is not copied."""
    there = [tensor for tensor in tensors if tensor is not None]
    return there[0][None] if len(there) == 1 else torch.stack(there)


def _as_tdm_error(error: Exception) -> TDMError:
    if isinstance(error, TDMError):
        return error
    logger.error("generation failed", exc_info=error)
    return GenerationError(f"generation failed ({type(error).__name__}); the request is not at fault, retry it")
