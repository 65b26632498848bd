"""Stage 3: TDM-unify, a K-step student for every K at once (sec. 3.2 and Algorithm 1).

Each sample of a batch has its own step count K and its own place on the K-step trajectory.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from tdm_runtime.noise_schedule import spaced_timesteps
from tdm_runtime.recipe import Recipe
from tdm_runtime.step_condition import embed_step_count
from tdm_runtime.step_table import StepTable
from training.glyphs import load_glyphs
from training.loop import LoopConfig, Trainable, descend, learning_rate_at, run_loop, set_learning_rate, update_ema
from training.losses import (
    ForwardKernel,
    fake_score_loss,
    guided,
    importance_weight,
    pseudo_huber,
    revised_samples,
)
from training.precision import autocast
from training.scenes import caption, sample_scene
from training.teacher import SCHEDULE, STEP_CONDITION_DIM, levels_at
from training.text import tokenize

STAGE = "tdm"


@dataclass(frozen=True)
class TDMConfig:
    """The distillation."""

    loop: LoopConfig = LoopConfig(steps=900)
    step_counts: tuple[int, ...] = (1, 2, 3, 4)
    batch_size: int = 32
    student_learning_rate: float = 1e-4
    fake_learning_rate: float = 4e-4
    condition_lr_scale: float = 10.0
    """Of the zero-initialised projection of K, which otherwise is barely learned."""
    guidance_scale: float = 3.0
    """Of the teacher; the student has it built in and runs without."""
    ema_decay: float = 0.998


def build_recipe(step_counts: tuple[int, ...]) -> Recipe:
    """Return the sampling contract: DDIM at t_i = T i / K, v-prediction, cosine schedule."""
    return Recipe(
        name="tdm-emoji",
        prediction_type="v_prediction",
        noise_schedule=SCHEDULE,
        solver="ddim",
        timesteps={k: tuple(spaced_timesteps("trailing", k, SCHEDULE.num_train_timesteps)) for k in step_counts},
        default_steps=max(step_counts),
        native_sizes=((64, 64),),
        step_condition="timestep_cond",
    )


@dataclass(frozen=True)
class Denoised:
    """One call of a v-prediction UNet, as an estimate of x_0."""

    unet: UNet2DConditionModel

    def __call__(self, x: Tensor, timesteps: Tensor, prompt_embeds: Tensor, step_counts: Tensor | None) -> Tensor:
        """Return x_0 estimates, float32, shaped as x. `step_counts` None asks the teacher, who knows no K."""
        condition = None if step_counts is None else embed_step_count(step_counts, STEP_CONDITION_DIM)
        with autocast():
            output = self.unet(x, timesteps, prompt_embeds, timestep_cond=condition).sample
        alphas, sigmas = levels_at(timesteps)
        x_0: Tensor = alphas * x - sigmas * output.float()
        return x_0


@dataclass(frozen=True)
class TrajectoryPlaces:
    """Where each sample of a batch stands: step `row` of its `step_counts`-step trajectory. All [B]."""

    step_counts: Tensor
    row: Tensor
    timestep: Tensor
    """t_{m+1}: the step starts here."""
    next_timestep: Tensor
    """t_m: and ends here; -1 is the clean end."""

    def draw_tau(self, generator: torch.Generator) -> Tensor:
        """Uniform whole timesteps in (t_m, t_{m+1}]: the intervals of one K are disjoint (Eq. 5)."""
        width = (self.timestep - self.next_timestep).float()
        offset = (torch.rand(len(width), generator=generator) * width).floor().long()
        return self.next_timestep + 1 + offset

    def kernel(self, tau: Tensor) -> ForwardKernel:
        return ForwardKernel(*levels_at(tau), *levels_at(self.next_timestep))


def draw_places(tables: Mapping[int, StepTable], batch_size: int, generator: torch.Generator) -> TrajectoryPlaces:
    """K uniform in the list, the step uniform among its K."""
    counts = torch.tensor(sorted(tables))
    step_counts = counts[torch.randint(len(counts), (batch_size,), generator=generator)]
    row = (torch.rand(batch_size, generator=generator) * step_counts).floor().long()
    timesteps = {k: [*table.timesteps, -1.0] for k, table in tables.items()}
    pairs = [timesteps[k][j : j + 2] for k, j in zip(step_counts.tolist(), row.tolist(), strict=True)]
    ends = torch.tensor(pairs).long()
    return TrajectoryPlaces(step_counts, row, ends[:, 0], ends[:, 1])


def advance(
    denoise: Denoised, tables: Mapping[int, StepTable], x: Tensor, row: Tensor, step_counts: Tensor, embeds: Tensor
) -> tuple[Tensor, Tensor]:
    """One solver step of each sample by its own table row. Returns (x at the next timestep, x_0)."""
    rows = list(zip(step_counts.tolist(), row.tolist(), strict=True))
    timesteps = torch.tensor([tables[k].timesteps[j] for k, j in rows]).long()
    ab = torch.from_numpy(np.array([(tables[k].a[j], tables[k].b[j]) for k, j in rows], dtype=np.float32))
    x_0 = denoise(x, timesteps, embeds, step_counts)
    a, b = (column.view(-1, 1, 1, 1) for column in ab.unbind(1))
    return a * x + b * x_0, x_0


@torch.no_grad()
def roll_out(
    student: Denoised, tables: Mapping[int, StepTable], noise: Tensor, places: TrajectoryPlaces, embeds: Tensor
) -> Tensor:
    """Run each sample from noise to the start of its step (Algorithm 1, lines 3-5)."""
    x = noise.clone()
    for step in range(int(places.row.max())):
        going = (places.row > step).nonzero().flatten()
        row = torch.full_like(going, step)
        x[going], _ = advance(student, tables, x[going], row, places.step_counts[going], embeds[going])
    return x


class TDMTrainer:
    """Student, fake score and teacher, taking turns."""

    def __init__(self, teacher_folder: Path, config: TDMConfig) -> None:
        self.config = config
        self.tables = build_recipe(config.step_counts).step_tables
        self.glyphs = load_glyphs()
        self.tokenizer = CLIPTokenizer.from_pretrained(teacher_folder / "tokenizer")
        self.text_encoder = CLIPTextModel.from_pretrained(teacher_folder / "text_encoder").eval().requires_grad_(False)
        teacher = UNet2DConditionModel.from_pretrained(teacher_folder / "unet")
        teacher.set_attn_processor(AttnProcessor())
        self.student_unet, self.fake_unet = copy.deepcopy(teacher), copy.deepcopy(teacher)
        self.average = copy.deepcopy(teacher).eval().requires_grad_(False)
        self.teacher = Denoised(teacher.eval().requires_grad_(False))
        self.student, self.fake = Denoised(self.student_unet), Denoised(self.fake_unet)
        self.student_optimizer = self._optimizer(self.student_unet, config.student_learning_rate)
        self.fake_optimizer = self._optimizer(self.fake_unet, config.fake_learning_rate)
        with torch.no_grad():
            self.empty_embeds = self.encode([""])

    def _optimizer(self, unet: UNet2DConditionModel, rate: float) -> torch.optim.AdamW:
        projection = list(unet.time_embedding.cond_proj.parameters())
        rest = [p for name, p in unet.named_parameters() if "cond_proj" not in name]
        groups = [
            {"params": rest, "lr_scale": 1.0},
            {"params": projection, "lr_scale": self.config.condition_lr_scale},
        ]
        return torch.optim.AdamW(groups, lr=rate, betas=(0.0, 0.999), weight_decay=0.0)

    def trainable(self) -> Trainable:
        return Trainable(
            {"student": self.student_unet, "fake": self.fake_unet, "average": self.average},
            {"student": self.student_optimizer, "fake": self.fake_optimizer},
        )

    @torch.no_grad()
    def encode(self, captions: list[str]) -> Tensor:
        """prompt_embeds [B, L, D]."""
        embeds: Tensor = self.text_encoder(tokenize(self.tokenizer, captions)).last_hidden_state
        return embeds

    def captions(self, step: int) -> list[str]:
        """Captions of the training set, worded anew; pictures are not needed (the method is data-free)."""
        rng = random.Random(step)
        size, seed = self.config.batch_size, self.config.loop.seed
        scenes = (sample_scene(self.glyphs, seed, step * size + n) for n in range(size))
        return [caption(scene, rng) for scene in scenes]

    def train_step(self, step: int, generator: torch.Generator) -> dict[str, float]:
        """One iteration of Algorithm 1: rollout, fake score, generator, one update each."""
        config = self.config
        for optimizer, rate in (
            (self.student_optimizer, config.student_learning_rate),
            (self.fake_optimizer, config.fake_learning_rate),
        ):
            set_learning_rate(optimizer, learning_rate_at(step, config.loop.steps, rate, warmup=50, floor=0.1))
        embeds = self.encode(self.captions(step))
        places = draw_places(self.tables, config.batch_size, generator)
        noise = torch.randn(config.batch_size, 4, 16, 16, generator=generator)
        x = roll_out(self.student, self.tables, noise, places, embeds)
        x_m, x_0 = advance(self.student, self.tables, x, places.row, places.step_counts, embeds)

        fake_loss = self.fake_score_loss(x_m.detach(), x_0.detach(), places, embeds, generator)
        fake_norm = descend(self.fake_optimizer, fake_loss)
        student_loss, gap = self.generator_loss(x_m, places, embeds, generator)
        student_norm = descend(self.student_optimizer, student_loss)
        update_ema(self.average, self.student_unet, step, config.ema_decay)
        return {
            "fake_loss": fake_loss.item(),
            "student_loss": student_loss.item(),
            "gap_rms": gap,
            "fake_norm": fake_norm,
            "student_norm": student_norm,
        }

    def fake_score_loss(
        self, x_m: Tensor, x_0: Tensor, places: TrajectoryPlaces, embeds: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Eq. (7) with importance sampling: x_tau drawn near x_m, target x_0, weighted by the density ratio."""
        tau = places.draw_tau(generator)
        kernel = places.kernel(tau)
        noise = torch.randn(x_m.shape, generator=generator)
        x_tau = kernel.diffuse(x_m, noise)
        denoised = self.fake(x_tau, tau, embeds, places.step_counts)
        return fake_score_loss(kernel, denoised, x_0, importance_weight(kernel, x_tau, x_0, noise))

    def generator_loss(
        self, x_m: Tensor, places: TrajectoryPlaces, embeds: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, float]:
        """Eq. (11). Returns the loss and the root mean square of real minus fake."""
        tau = places.draw_tau(generator)
        with torch.no_grad():
            x_tau = places.kernel(tau).diffuse(x_m, torch.randn(x_m.shape, generator=generator))
            empty = self.empty_embeds.expand_as(embeds)
            conditional, unconditional = self.teacher(
                torch.cat([x_tau, x_tau]), torch.cat([tau, tau]), torch.cat([embeds, empty]), None
            ).chunk(2)
            real = guided(conditional, unconditional, self.config.guidance_scale)
            fake = self.fake(x_tau, tau, embeds, places.step_counts)
        revised = revised_samples(x_m, real, fake)
        return pseudo_huber(x_m, revised), (real - fake).square().mean().sqrt().item()


def train_tdm(folder: Path, teacher_folder: Path, config: TDMConfig) -> None:
    """Distil or resume; leaves the averaged student in `folder/unet`."""
    torch.manual_seed(config.loop.seed)
    trainer = TDMTrainer(teacher_folder, config)
    run_loop(folder, STAGE, config.loop, trainer.trainable(), trainer.train_step)
    trainer.average.save_pretrained(folder / "unet")
