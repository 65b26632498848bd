"""Stage `student`: TDM-unify on the clip teacher, which trains one student for every K."""

from __future__ import annotations

import random
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from tdm_runtime.checkpoint.frame_rule import FrameRule
from tdm_runtime.checkpoint.recipe import Recipe
from tdm_runtime.families.animatediff import MotionUNetDenoiser
from tdm_runtime.families.conditioning import Conditioning
from training.config import DistillConfig
from training.emoji.data.text import tokenize
from training.emoji.stages.teacher import COORDINATES
from training.emoji_video.clips import FPS, FRAMES, SIDE_PX, caption, sample_clip, video_glyphs
from training.emoji_video.latents import FRAME_SHAPE
from training.emoji_video.motion_unet import frames_shown, load_motion_unet
from training.methods.roles import CleanEstimator, SeparateRoles
from training.pretrained.model_folder import recipe_of
from training.run.distill import Distiller, Run, distill
from training.run.plot import plot_log

EMOJI_VIDEO = DistillConfig(
    steps=160,
    batch_size=6,
    guidance_scale=3.0,
    student_learning_rate=1e-4,
    fake_learning_rate=4e-4,
    warmup_steps=10,
    final_lr_share=0.1,
    ema_decay=0.98,
    width=SIDE_PX,
    height=SIDE_PX,
    frames=FRAMES,
    log_every=5,
)
"""Settings of the embedded clip checkpoint's distillation."""
TRAINED_FRAMES = 3
"""Frames of a clip that an iteration trains on, at their true positions."""
NAME = "tdm-emoji-video"


class ClipPrompts:
    """Captions of training clips, encoded by the clip teacher's text encoder. The wording varies with the number."""

    def __init__(self, teacher_folder: Path, seed: int) -> None:
        self.glyphs, self.seed = video_glyphs(), seed
        self.tokenizer = CLIPTokenizer.from_pretrained(teacher_folder / "tokenizer")
        self.text_encoder = CLIPTextModel.from_pretrained(teacher_folder / "text_encoder").float().eval()
        self.text_encoder.requires_grad_(False)

    @torch.no_grad()
    def encode(self, captions: list[str]) -> Conditioning:
        """Encode captions, with prompt_embeds [B, 32, 128]."""
        return Conditioning(self.text_encoder(tokenize(self.tokenizer, captions)).last_hidden_state)

    def conditioning(self, numbers: range) -> Conditioning:
        return self.encode([caption(sample_clip(self.glyphs, self.seed, n), random.Random(n)) for n in numbers])

    def empty(self) -> Conditioning:
        return self.encode([""])

    def latents(self, numbers: range) -> Tensor | None:
        """Return None: the method learns from the teacher alone."""
        return None


class SomeFramesDistiller(Distiller):
    """A distillation whose iterations each take some frames of a clip, at their true positions."""

    def train_step(self, step: int, generator: torch.Generator) -> dict[str, float]:
        frames = sorted(torch.randperm(FRAMES, generator=generator)[: self.run.latent_shape[1]].tolist())
        teacher = self.roles.teacher
        assert isinstance(teacher, CleanEstimator)
        with ExitStack() as stack:
            for module in (teacher.denoiser, self.roles.module("student"), self.roles.module("fake")):
                stack.enter_context(frames_shown(module, frames))
            return super().train_step(step, generator)


def build_video_distiller(config: DistillConfig, teacher_folder: Path, frames: int = TRAINED_FRAMES) -> Distiller:
    """Return a distillation of the clip teacher, before its first iteration."""
    torch.manual_seed(config.seed)
    teacher = MotionUNetDenoiser(load_motion_unet(teacher_folder / "unet"))
    roles = SeparateRoles(teacher, COORDINATES, precision=config.precision)
    shape = (FRAME_SHAPE[0], frames, *FRAME_SHAPE[1:])
    return SomeFramesDistiller(Run(roles, COORDINATES, ClipPrompts(teacher_folder, config.seed), shape, config))


def train_video_student(folder: Path, teacher_folder: Path, config: DistillConfig) -> None:
    """Distil or resume. Write the averaged student to `folder/unet` and the curves to `folder/metrics.png`."""
    distiller = build_video_distiller(config, teacher_folder)
    distill(folder, distiller)
    distiller.average.model.save_pretrained(folder / "unet")  # type: ignore[union-attr, operator]
    plot_log(folder)


def build_video_recipe(config: DistillConfig = EMOJI_VIDEO) -> Recipe:
    """Return the recipe of the embedded clip checkpoint."""
    recipe = recipe_of(config, COORDINATES, NAME)
    return replace(recipe, frames=FrameRule(FRAMES, FRAMES - 1, FRAMES), fps=FPS)
