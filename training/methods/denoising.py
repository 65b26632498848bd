"""Denoising loss of a teacher, for its training and for TDM-unify-SFT (sec. 3.1, "Better Teacher Better Student")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tdm_runtime.families.conditioning import Conditioning
from training.methods.losses import denoising_loss
from training.methods.precision import autocast
from training.methods.roles import CleanEstimator
from training.methods.trajectory import Coordinates


def denoising_target(coordinates: Coordinates, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Return the target of the model output, by the prediction type of the coordinates."""
    alphas, sigmas = coordinates.levels(timesteps, latents)
    match coordinates.prediction_type:
        case "epsilon":
            return noise
        case "v_prediction":
            return alphas * noise - sigmas * latents
        case "flow_prediction":
            return noise - latents
        case "sample":
            return latents


@dataclass(frozen=True)
class DenoisingDraws:
    """The random numbers of a batch, [B, ...] each, on the CPU."""

    timesteps: Tensor
    noise: Tensor
    is_dropped: Tensor
    """Whether a sample trains on the empty prompt, [B]."""

    def __getitem__(self, part: slice) -> DenoisingDraws:
        return DenoisingDraws(self.timesteps[part], self.noise[part], self.is_dropped[part])


def draw_denoising(
    coordinates: Coordinates, shape: Sequence[int], dropout: float, generator: torch.Generator
) -> DenoisingDraws:
    """Draw uniform timesteps, noise of `shape` [B, ...], and which samples lose their prompt, a share of `dropout`."""
    low = torch.full((shape[0],), coordinates.clean_end, dtype=torch.float64)
    timesteps = coordinates.draw_between(low, torch.full_like(low, coordinates.schedule.max_timestep), generator)
    noise = torch.randn(*shape, generator=generator)
    return DenoisingDraws(timesteps, noise, torch.rand(shape[0], generator=generator) < dropout)


def finetuning_loss(
    model: CleanEstimator,
    latents: Tensor,
    conditioning: Conditioning,
    empty: Conditioning,
    dropout: float,
    generator: torch.Generator,
) -> Tensor:
    """Return the mean squared error at uniform timesteps.

    Args:
        latents: Latents of unit spread, [B, ...].
        dropout: Share of samples that train on the empty prompt, for guidance.
    """
    draws = draw_denoising(model.coordinates, latents.shape, dropout, generator)
    return denoising_loss_at(model, latents, conditioning, empty, draws)


def denoising_loss_at(
    model: CleanEstimator, latents: Tensor, conditioning: Conditioning, empty: Conditioning, draws: DenoisingDraws
) -> Tensor:
    """Return the mean squared error of latents [B, ...] for numbers that are already drawn."""
    coordinates, count = model.coordinates, len(latents)
    noise = draws.noise.to(latents.device)
    kept = Conditioning.cat(conditioning, empty.expand(count))
    index = torch.arange(count) + count * draws.is_dropped
    alphas, sigmas = coordinates.levels(draws.timesteps, latents)
    with autocast(latents.device, model.precision):
        output = model.denoiser(
            alphas * latents + sigmas * noise,
            draws.timesteps.to(latents.device, torch.float32),
            None,
            *kept[index].tensors(),
        )
    return denoising_loss(output, denoising_target(coordinates, latents, noise, draws.timesteps))
