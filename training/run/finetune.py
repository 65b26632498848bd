"""Fine-tune a teacher on real latents before its distillation: TDM-unify-SFT, "Better Teacher Better Student"."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from training.config import ConfigError, check_shared_fields, require, require_not_negative
from training.methods.batch import PromptSource
from training.methods.denoising import DenoisingDraws, denoising_loss_at, draw_denoising
from training.methods.precision import Precision
from training.methods.roles import CleanEstimator
from training.run.loop import (
    Trainable,
    accumulated_update,
    learning_rate_at,
    run_loop,
    set_learning_rate,
    update_ema,
)
from training.run.processes import Processes

STAGE = "finetune"


@dataclass(frozen=True)
class FinetuneConfig:
    """Settings of a fine-tuning. The paper names the data (LAION-AeS-6.5+) and no numbers; the defaults are ours."""

    steps: int = 10_000
    """Optimizer iterations."""
    batch_size: int = 64
    """Samples of one iteration, summed over processes and accumulated parts."""
    accumulation: int = 1
    """Number of parts of a process's share of the batch. Each part has a backward pass of its own."""
    learning_rate: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)
    """Betas of AdamW."""
    weight_decay: float = 0.01
    warmup_steps: int = 100
    """Iterations of linear warm-up of the learning rate."""
    final_lr_share: float = 1.0
    """Share of the learning rate that is left at the end of a cosine. 1 is constant."""
    clip_norm: float = 1.0
    """Greatest gradient norm; larger gradients are scaled down to it."""
    prompt_dropout: float = 0.1
    """Share of samples that train on the empty prompt, in [0, 1]. Guidance needs the estimate without a prompt."""
    ema_decay: float = 0.999
    """Decay of the average of the weights, which is the result."""
    seed: int = 0
    """Seed of prompts, noise and dropout."""
    precision: Precision = "bf16"
    gradient_checkpointing: bool = False
    """Whether the backward pass computes activations again, which saves memory and takes time. For diffusers models."""
    save_every_s: float = 120.0
    """Seconds between two saved states."""
    log_every: int = 50
    """Iterations between two lines of the log."""

    def __post_init__(self) -> None:
        check_shared_fields(vars(self))
        require("steps", self.steps, self.steps >= 1, "at least 1")
        for name in ("learning_rate", "weight_decay"):
            require_not_negative(name, getattr(self, name))
        require("prompt_dropout", self.prompt_dropout, 0 <= self.prompt_dropout <= 1, "a share, in [0, 1]")


def finetune(
    folder: Path,
    estimator: CleanEstimator,
    prompts: PromptSource,
    config: FinetuneConfig,
    processes: Processes | None = None,
) -> nn.Module:
    """Train `estimator.denoiser`, or resume in `folder`.

    Args:
        folder: Folder of state and log. The caller saves the result.
        estimator: Model on the device of `processes`, with its prediction type. The config decides the precision.
        prompts: Prompts with latents.

    Returns:
        A copy of the denoiser with the average of its weights, in eval mode.

    Raises:
        ConfigError: The prompts have no latents.
        TrainingDivergedError: A loss or gradient is not finite. The last state in `folder` is older and finite.
    """
    processes = processes or Processes()
    if prompts.latents(range(1)) is None:
        raise ConfigError("fine-tuning learns from real latents, and the prompts have none; give a set with latents")
    model = estimator.denoiser.train().requires_grad_(True)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
    )
    step_of = _FinetuneStep(
        replace(estimator, precision=config.precision), average, optimizer, prompts, config, processes
    )
    trainable = Trainable({"model": model, "average": average}, {"model": optimizer})
    run_loop(folder, STAGE, config, trainable, step_of.train_step, processes=processes)
    return average


@dataclass(frozen=True)
class _FinetuneStep:
    estimator: CleanEstimator
    average: nn.Module
    optimizer: torch.optim.Optimizer
    prompts: PromptSource
    config: FinetuneConfig
    processes: Processes

    def train_step(self, step: int, generator: torch.Generator) -> dict[str, float]:
        """Draw numbers for the whole batch, train on this process's parts, average the gradients."""
        config = self.config
        rate = learning_rate_at(step, config.steps, config.learning_rate, config.warmup_steps, config.final_lr_share)
        set_learning_rate(self.optimizer, rate)
        first = step * config.batch_size
        latent = self.prompts.latents(range(first, first + 1))
        assert latent is not None, "checked at the start"
        shape = (config.batch_size, *latent.shape[1:])
        draws = draw_denoising(self.estimator.coordinates, shape, config.prompt_dropout, generator)
        parts = self.processes.parts(config.batch_size, config.accumulation)
        losses = self._losses(parts, first, draws)
        loss, norm = accumulated_update(self.optimizer, losses, len(parts), config.clip_norm, self.processes)
        update_ema(self.average, self.estimator.denoiser, step, config.ema_decay)
        return {"loss": self.processes.mean(loss), "norm": norm}

    def _losses(self, parts: Sequence[slice], first: int, draws: DenoisingDraws) -> Iterator[Tensor]:
        device = self.processes.device
        empty = self.prompts.empty().to(device)
        for part in parts:
            numbers = range(first + part.start, first + part.stop)
            latents = self.prompts.latents(numbers)
            assert latents is not None, "checked at the start"
            conditioning = self.prompts.conditioning(numbers).to(device)
            yield denoising_loss_at(self.estimator, latents.to(device), conditioning, empty, draws[part])
