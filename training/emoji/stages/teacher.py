"""Stage 2: the teacher, a text-conditioned v-prediction UNet on latents, trained with caption dropout."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from numpy.lib.format import open_memmap
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from tdm_runtime.families.conditioning import Conditioning
from tdm_runtime.families.unet import UNetDenoiser
from tdm_runtime.sampling.schedule import DiffusionSchedule
from training.emoji.data.scenes import caption, sample_scene
from training.emoji.data.text import build_text_encoder, tokenize, train_tokenizer
from training.emoji.stages.autoencoder import SceneRenderer
from training.methods.denoising import finetuning_loss
from training.methods.precision import Precision, autocast
from training.methods.roles import CleanEstimator
from training.methods.trajectory import Coordinates
from training.run.loop import LoopConfig, learning_rate_at, set_learning_rate, train_averaged

STAGE = "teacher"
SCHEDULE = DiffusionSchedule(beta_schedule="squaredcos_cap_v2")
"""The cosine schedule suits 16x16 latents. It ends in nearly pure noise, so the noise does not fix the background."""
COORDINATES = Coordinates(SCHEDULE, "v_prediction")
STEP_CONDITION_DIM = 64


@dataclass(frozen=True)
class TeacherConfig:
    """Settings of the teacher's training."""

    loop: LoopConfig = LoopConfig(steps=11000)
    batch_size: int = 64
    learning_rate: float = 8e-4
    caption_dropout: float = 0.1
    """Share of captions replaced by the empty one, for classifier-free guidance."""
    ema_decay: float = 0.999
    scenes: int = 60000
    """Number of different scenes. Their latents are encoded before training."""


def build_unet() -> UNet2DConditionModel:
    """Return an untrained denoiser of 6.6 M parameters, with an input for K that the student uses."""
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(96, 160),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=(3, 5),
        norm_num_groups=16,
        time_cond_proj_dim=STEP_CONDITION_DIM,
    )
    torch.nn.init.zeros_(unet.time_embedding.cond_proj.weight)
    # The plain processor's backward pass is a third faster than SDPA's on a CPU.
    unet.set_attn_processor(AttnProcessor())
    return unet


class LatentScenes:
    """Latents and captions of numbered scenes. The latents are encoded once and kept on disk.

    Latents are float16 [4, 16, 16], of unit spread.
    """

    def __init__(self, folder: Path, autoencoder: AutoencoderKL, count: int, seed: int) -> None:
        self.renderer = SceneRenderer(seed)
        self.count = count
        file = folder / "latents.npy"
        if not file.is_file():
            encode_items(file, autoencoder, (count, 4, 16, 16), self.renderer.pixels)
        self._latents = np.load(file, mmap_mode="r")
        if len(self._latents) != count:
            raise ValueError(f"{file} holds {len(self._latents)} scenes instead of {count}; remove it to make it again")

    def batch(self, indices: list[int], caption_seed: int) -> tuple[Tensor, list[str]]:
        """Return latents [B, 4, 16, 16] float32 and captions. The seed decides the wording."""
        rng = random.Random(caption_seed)
        scenes = (sample_scene(self.renderer.glyphs, self.renderer.seed, index) for index in indices)
        return torch.from_numpy(self._latents[indices].astype(np.float32)), [caption(s, rng) for s in scenes]


@torch.no_grad()
def encode_items(
    file: Path,
    autoencoder: AutoencoderKL,
    shape: tuple[int, ...],
    pixels: Callable[[range], Tensor],
    *,
    chunk: int = 250,
    precision: Precision = "bf16",
) -> None:
    """Write the latents of numbered items, float16 of unit spread. The file appears once it is whole.

    Args:
        shape: Shape of the array, items first. Latents of an item's pictures are stored in their order.
        pixels: Function from numbers of items to their pictures, [B, 3, 64, 64] in [-1, 1].
        chunk: Items of one call.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial.npy")
    latents = open_memmap(partial, mode="w+", dtype=np.float16, shape=shape)
    for start in range(0, len(latents), chunk):
        items = range(start, min(start + chunk, len(latents)))
        with autocast(precision=precision):
            posterior = autoencoder.encode(pixels(items)).latent_dist
        means = posterior.mode().float() * autoencoder.config.scaling_factor
        latents[items.start : items.stop] = means.reshape(len(items), *shape[1:]).numpy()
    latents.flush()
    partial.rename(file)


def train_teacher(folder: Path, autoencoder_folder: Path, config: TeacherConfig) -> None:
    """Train or resume. Write `folder/{unet,text_encoder,tokenizer}` in diffusers layout."""
    torch.manual_seed(config.loop.seed)
    autoencoder = AutoencoderKL.from_pretrained(autoencoder_folder / "vae").eval()
    scenes = LatentScenes(folder, autoencoder, config.scenes, config.loop.seed)
    tokenizer = train_tokenizer(scenes.renderer.glyphs)
    unet, text_encoder = build_unet(), build_text_encoder(tokenizer)
    model = CleanEstimator(UNetDenoiser(unet), COORDINATES)
    modules = {"unet": unet, "text_encoder": text_encoder}
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=1e-2)

    def loss_at(step: int, generator: torch.Generator) -> Tensor:
        set_learning_rate(optimizer, learning_rate_at(step, config.loop.steps, config.learning_rate))
        indices = torch.randint(scenes.count, (config.batch_size,), generator=generator).tolist()
        latents, captions = scenes.batch(indices, caption_seed=step)
        with autocast():
            prompts, empty = (Conditioning(text_encoder(tokenize(tokenizer, c))[0]) for c in (captions, [""]))
        return finetuning_loss(model, latents, prompts, empty, config.caption_dropout, generator)

    averages = train_averaged(folder, STAGE, config.loop, modules, optimizer, loss_at, config.ema_decay)
    save_teacher(folder, averages["unet"], averages["text_encoder"], tokenizer)


def save_teacher(
    folder: Path, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer
) -> None:
    """Write a teacher in diffusers layout."""
    unet.save_pretrained(folder / "unet")
    text_encoder.save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
