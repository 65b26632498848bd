"""Stage 3: TDM-unify on the emoji teacher, which trains one student for every K."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from tdm_runtime.checkpoint.recipe import Recipe
from tdm_runtime.families.conditioning import Conditioning
from tdm_runtime.families.unet import UNetDenoiser
from tdm_runtime.model.decoder import torch_decoder
from training.config import DistillConfig
from training.emoji.data.glyphs import load_glyphs
from training.emoji.data.scenes import caption, sample_scene
from training.emoji.data.text import GRID_PROMPTS, tokenize
from training.emoji.stages.teacher import COORDINATES
from training.methods.roles import LoraRoles, Roles, SeparateRoles
from training.pretrained.model_folder import recipe_of
from training.pretrained.student_files import save_denoiser
from training.run.distill import Distiller, Run, distill
from training.run.plot import SampleGrid, plot_log
from training.run.processes import Processes

EMOJI = DistillConfig(
    steps=2000,
    guidance_scale=3.0,
    student_learning_rate=1e-4,
    fake_learning_rate=4e-4,
    discriminator_learning_rate=1e-4,
    warmup_steps=50,
    final_lr_share=0.1,
    ema_decay=0.998,
    width=64,
    height=64,
    grid_every=500,
)
"""Settings of the embedded checkpoint's distillation."""
LATENT_SHAPE = (4, 16, 16)
LATENTS_SEED = 0
"""Stream of the scenes whose latents the teacher learned."""


class ScenePrompts:
    """Captions of training scenes, encoded by the teacher's text encoder. The wording varies with the number."""

    def __init__(self, teacher_folder: Path, seed: int, latents_file: Path | None = None, first: int = 0) -> None:
        """Load tokenizer and text encoder.

        Args:
            seed: Stream of scenes.
            latents_file: Latents of that stream's scenes, [N, 4, 16, 16], for methods that learn from data.
            first: Number of the scene that prompt 0 describes.
        """
        self.glyphs, self.seed, self.first = load_glyphs(), seed, first
        self.tokenizer = CLIPTokenizer.from_pretrained(teacher_folder / "tokenizer")
        self.text_encoder = CLIPTextModel.from_pretrained(teacher_folder / "text_encoder").eval().requires_grad_(False)
        self._latents = None if latents_file is None else np.load(latents_file, mmap_mode="r")

    @torch.no_grad()
    def encode(self, captions: list[str]) -> Conditioning:
        """Encode captions, with prompt_embeds [B, 32, 128]."""
        return Conditioning(self.text_encoder(tokenize(self.tokenizer, captions)).last_hidden_state)

    def captions(self, numbers: range) -> list[str]:
        """Return the caption of each scene. The number decides the wording."""
        scenes = ((n, sample_scene(self.glyphs, self.seed, self._scene(n))) for n in numbers)
        return [caption(scene, random.Random(n)) for n, scene in scenes]

    def conditioning(self, numbers: range) -> Conditioning:
        return self.encode(self.captions(numbers))

    def empty(self) -> Conditioning:
        return self.encode([""])

    def latents(self, numbers: range) -> Tensor | None:
        if self._latents is None:
            return None
        return torch.from_numpy(self._latents[[self._scene(n) for n in numbers]].astype(np.float32))

    def _scene(self, number: int) -> int:
        scene = self.first + number
        return scene if self._latents is None else scene % len(self._latents)


def load_denoiser(folder: Path) -> UNetDenoiser:
    """Load an emoji UNet in float32, with the attention that trains fastest on a CPU."""
    unet = UNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.float32)
    unet.set_attn_processor(AttnProcessor())
    return UNetDenoiser(unet)


def build_distiller(
    config: DistillConfig,
    teacher_folder: Path,
    *,
    latents_file: Path | None = None,
    student_folder: Path | None = None,
    processes: Processes | None = None,
) -> Distiller:
    """Return a distillation of the emoji teacher, before its first iteration.

    Args:
        latents_file: Latents of stream `LATENTS_SEED`, which prompts then come from. The seed of the config decides the
            first scene. By default the config's seed is the stream, and there are no latents.
        student_folder: UNet that the student starts from instead of the teacher (an LCM, Fig. 8).
    """
    processes = processes or Processes()
    torch.manual_seed(config.seed)
    teacher = load_denoiser(teacher_folder / "unet").to(processes.device)
    roles: Roles
    if config.lora_rank:
        roles = LoraRoles(teacher, COORDINATES, config.lora_rank, config.adapter_alpha, precision=config.precision)
    else:
        student = None if student_folder is None else load_denoiser(student_folder).to(processes.device)
        roles = SeparateRoles(teacher, COORDINATES, student=student, precision=config.precision)
    if latents_file is None:
        prompts = ScenePrompts(teacher_folder, config.seed)
    else:
        first = config.seed * config.steps * config.batch_size
        prompts = ScenePrompts(teacher_folder, LATENTS_SEED, latents_file, first)
    return Distiller(Run(roles, COORDINATES, prompts, LATENT_SHAPE, config), processes)


def train_student(
    folder: Path, teacher_folder: Path, config: DistillConfig, autoencoder_folder: Path | None = None
) -> None:
    """Distil or resume. Write the averaged student to `folder/unet` and the curves to `folder/metrics.png`.

    Args:
        autoencoder_folder: Folder of the autoencoder that decodes the sample grids of `config.grid_every`.
    """
    distiller = build_distiller(config, teacher_folder)
    grid = None
    if config.grid_every and autoencoder_folder is not None:
        prompts = distiller.run.prompts
        assert isinstance(prompts, ScenePrompts)
        decoder = torch_decoder(AutoencoderKL.from_pretrained(autoencoder_folder / "vae").eval(), distiller.device)
        grid = SampleGrid(folder / "samples", distiller, prompts.encode(list(GRID_PROMPTS)), decoder.decode)
    distill(folder, distiller, None if grid is None else grid.draw)
    if distiller.processes.is_main:
        save_denoiser(distiller.average, folder)  # type: ignore[arg-type]
        plot_log(folder)


def build_recipe(config: DistillConfig = EMOJI) -> Recipe:
    """Return the recipe of the embedded checkpoint."""
    return recipe_of(config, COORDINATES, "tdm-emoji")
