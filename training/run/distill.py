"""A distillation run: networks, optimizers and their updates, for every backbone and method."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from tdm_runtime.families.conditioning import Conditioning
from training.config import ConfigError, DistillConfig
from training.methods.adversarial import Adversary, build_discriminator
from training.methods.batch import Batch, PromptSource, draw, part_of
from training.methods.lcm import LCM, TCD, ConsistencyFunction, averaged
from training.methods.roles import CleanEstimator, Guided, Roles
from training.methods.tdm import TDM, StudentSample
from training.methods.trajectory import CleanEstimate, Coordinates, Start, Trajectories, build_trajectories, sample
from training.run.loop import (
    Trainable,
    accumulated_update,
    learning_rate_at,
    run_loop,
    set_learning_rate,
    update_ema,
)
from training.run.processes import Processes

STAGE = "tdm"


def trajectories_of(config: DistillConfig, coordinates: Coordinates) -> Trajectories:
    """Return the step tables of a run, from the config's timesteps or by default from t_i = T i / K."""
    return build_trajectories(
        coordinates, config.solver, {k: timesteps_of(config, coordinates, k) for k in config.step_counts}
    )


def timesteps_of(config: DistillConfig, coordinates: Coordinates, step_count: int) -> tuple[float, ...]:
    """Return the timesteps of K steps, falling."""
    return config.timesteps.get(step_count) or coordinates.even_timesteps(step_count)


@dataclass(frozen=True)
class Run:
    """Inputs of a distillation."""

    roles: Roles
    coordinates: Coordinates
    prompts: PromptSource
    latent_shape: tuple[int, ...]
    """[C, H, W] or [C, F, H, W]."""
    config: DistillConfig


class Distiller:
    """Trains student, fake score and, for TDM-unify-GAN, a discriminator, one after the other."""

    def __init__(self, run: Run, processes: Processes | None = None) -> None:
        self.run, self.config, self.roles = run, run.config, run.roles
        self.processes = processes or Processes()
        self.device = self.processes.device
        self.parts = self.processes.parts(self.config.batch_size, self.config.accumulation)
        self.trajectories = trajectories_of(self.config, run.coordinates)
        self.average = copy.deepcopy(self.roles.module("student")).eval().requires_grad_(False)
        self.real = Guided(self.roles.teacher, run.prompts.empty().to(self.device), self.config.guidance_scale)
        self.method = TDM(self.roles, self.trajectories, self.config, self.real)
        self.optimizers = {
            "student": self._optimizer(self.roles.module("student"), self.config.student_learning_rate),
            "fake": self._optimizer(self.roles.module("fake"), self.config.fake_learning_rate),
        }
        self.adversary = self._build_adversary()
        if self.config.needs_latents:
            self._require_latents()

    # -- an iteration ------------------------------------------------------------------------------

    def train_step(self, step: int, generator: torch.Generator) -> dict[str, float]:
        """Run one iteration (Algorithm 1): roll out, update the fake score, update the student."""
        self._set_learning_rates(step)
        draws = draw(self.config, self.trajectories, self.run.latent_shape, generator)
        first = step * self.config.batch_size
        batches = [
            part_of(draws, part, self.run.prompts, first, self.device, has_latents=self.config.needs_latents)
            for part in self.parts
        ]
        numbers = self._tdm_turns(batches) if self.config.method == "tdm" else self._consistency_turn(batches)
        update_ema(self.average, self.roles.module("student"), step, self.config.ema_decay)
        return {name: self.processes.mean(value) for name, value in numbers.items()}

    def _tdm_turns(self, batches: Sequence[Batch]) -> dict[str, float]:
        method = self.method
        samples = [Generated(method, batch, method.roll_out(batch), len(batches) == 1) for batch in batches]
        numbers: dict[str, float] = {}
        for n in range(self.config.fake_updates):
            losses = (method.fake_loss(s.batch, s.detached(), s.batch.fake[n]) for s in samples)
            numbers |= self._turn("fake", losses)
        if self.adversary is not None:
            adversary = self.adversary
            losses = (adversary.discriminator_loss(s.batch, s.detached(), s.batch.fake[0]) for s in samples)
            numbers |= self._turn("discriminator", losses)
        gaps: list[Tensor] = []
        numbers |= self._turn("student", (self._generator_loss(s, gaps) for s in samples))
        return numbers | {"gap_rms": torch.stack(gaps).mean().item()}

    def _generator_loss(self, generated: Generated, gaps: list[Tensor]) -> Tensor:
        batch, student = generated.batch, generated.with_gradient()
        loss, gap = self.method.generator_loss(batch, student, batch.generator)
        gaps.append(gap)
        if self.adversary is not None:
            loss = loss + self.config.adversarial_weight * self.adversary.generator_loss(
                batch, student, batch.generator
            )
        return loss

    def _consistency_turn(self, batches: Sequence[Batch]) -> dict[str, float]:
        return self._turn("student", (self._consistency.loss(batch) for batch in batches))

    def _turn(self, role: str, losses: Iterator[Tensor]) -> dict[str, float]:
        """Update one role. Return its loss and gradient norm."""
        loss, norm = accumulated_update(
            self.optimizers[role], self._ready(role, losses), len(self.parts), self.config.clip_norm, self.processes
        )
        return {f"{role}_loss": loss, f"{role}_norm": norm}

    def _ready(self, role: str, losses: Iterator[Tensor]) -> Iterator[Tensor]:
        """Yield each loss once its role is ready for the backward pass."""
        for loss in losses:
            if role in ("student", "fake"):
                self.roles.activate(role)  # type: ignore[arg-type]
            yield loss

    # -- trained parts and optimizers --------------------------------------------------------------

    def trainable(self) -> Trainable:
        """Return everything that a resume restores."""
        modules = {
            "student": self.roles.module("student"),
            "fake": self.roles.module("fake"),
            "average": self.average,
        }
        if self.adversary is not None:
            modules["discriminator"] = self.adversary.discriminator
        return Trainable(modules, self.optimizers)

    def _optimizer(self, module: nn.Module, rate: float) -> torch.optim.AdamW:
        """Return AdamW. The projection of K starts at zero, so its learning rate is scaled by `condition_lr_scale`."""
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        groups = [
            {"params": [p for name, p in named if "cond_proj" not in name], "lr_scale": 1.0},
            {
                "params": [p for name, p in named if "cond_proj" in name],
                "lr_scale": self.config.condition_lr_scale,
            },
        ]
        groups = [group for group in groups if group["params"]]
        return torch.optim.AdamW(groups, lr=rate, betas=self.config.betas, weight_decay=0.0)

    def _build_adversary(self) -> Adversary | None:
        if not self.config.adversarial_weight:
            return None
        discriminator = build_discriminator(self.roles.teacher.denoiser)  # type: ignore[arg-type]
        self.optimizers["discriminator"] = self._optimizer(discriminator, self.config.discriminator_learning_rate)
        return Adversary(self.method, discriminator.to(self.device))

    def _require_latents(self) -> None:
        if self.run.prompts.latents(range(1)) is None:
            needs = "adversarial_weight above 0" if self.config.method == "tdm" else f"method '{self.config.method}'"
            raise ConfigError(f"{needs} learns from real latents, and the prompts have none; give a set with latents")

    @cached_property
    def _consistency(self) -> LCM | TCD:
        student = self.roles.student
        assert isinstance(student, CleanEstimator)
        target = student if self.config.lora_rank else averaged(student, self.average)
        if self.config.method == "tcd":
            return TCD(self.real, student, target, self.run.coordinates)
        return LCM(self.real, ConsistencyFunction(student), ConsistencyFunction(target), self.run.coordinates)

    def _set_learning_rates(self, step: int) -> None:
        config = self.config
        rates = {
            "student": config.student_learning_rate,
            "fake": config.fake_learning_rate,
            "discriminator": config.discriminator_learning_rate,
        }
        for role, optimizer in self.optimizers.items():
            rate = learning_rate_at(step, config.steps, rates[role], config.warmup_steps, config.final_lr_share)
            set_learning_rate(optimizer, rate)

    # -- sampling ----------------------------------------------------------------------------------

    @contextmanager
    def averaged_student(self) -> Iterator[CleanEstimate]:
        """Give the student its averaged weights for the time of the block."""
        current = self.roles.module("student")
        self._swap(current)
        try:
            yield ConsistencyFunction(self.roles.student) if self.config.method == "lcm" else self.roles.student
        finally:
            self._swap(current)

    @torch.no_grad()
    def _swap(self, current: nn.Module) -> None:
        for ours, average in zip(current.parameters(), self.average.parameters(), strict=True):
            kept = ours.detach().clone()
            ours.copy_(average)
            average.copy_(kept)

    @torch.no_grad()
    def sample(
        self, noise: Tensor, step_count: int, conditioning: Conditioning, renoise: Tensor | None = None
    ) -> Tensor:
        """Return clean latents by the averaged student, sampled as the runtime samples it.

        Args:
            renoise: Fresh noise [B, rows, ...] for stochastic methods.
        """
        with self.averaged_student() as student:
            return sample(
                student,
                self.trajectories,
                noise,
                step_count,
                conditioning,
                with_k=self.config.student_receives_k,
                renoise=renoise,
            )


@dataclass
class Generated:
    """Student sample of one part.

    With one part, its graph is kept from the first use to the last. With several parts, each graph is
    computed again when it is needed, so that memory holds the activations of one part only.
    """

    method: TDM
    batch: Batch
    start: Start
    keeps_graph: bool
    _kept: StudentSample | None = None

    def detached(self) -> StudentSample:
        if self.keeps_graph:
            return self.with_gradient().detach()
        with torch.no_grad():
            return self.method.student_step(self.batch, self.start)

    def with_gradient(self) -> StudentSample:
        if self._kept is None or not self.keeps_graph:
            self._kept = self.method.student_step(self.batch, self.start)
        return self._kept


def distill(
    folder: Path,
    distiller: Distiller,
    draw_samples: Callable[[int], object] | None = None,
) -> None:
    """Train or resume in `folder`.

    Args:
        draw_samples: Called every `grid_every` iterations with the number of iterations done.
    """
    config = distiller.config

    def evaluate(done: int) -> dict[str, float]:
        if draw_samples is not None and distiller.processes.is_main:
            draw_samples(done)
        return {}

    run_loop(
        folder,
        STAGE,
        config,
        distiller.trainable(),
        distiller.train_step,
        evaluate if config.grid_every else None,
        config.grid_every or 1,
        processes=distiller.processes,
    )
