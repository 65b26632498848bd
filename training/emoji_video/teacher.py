"""Stage `teacher`: the clip denoiser learns motion from captioned clips, by v-prediction with caption dropout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from tdm_runtime.families.animatediff import MotionUNetDenoiser
from tdm_runtime.families.conditioning import Conditioning
from training.emoji.data.text import tokenize
from training.emoji.stages.teacher import COORDINATES, save_teacher
from training.emoji_video.clips import FRAMES, MOTIONS, REVERSED
from training.emoji_video.latents import FRAME_SHAPE, LatentClips
from training.emoji_video.motion_unet import build_motion_unet, frames_shown, motion_parameters
from training.methods.denoising import DenoisingDraws, denoising_loss_at
from training.methods.precision import Precision
from training.methods.roles import CleanEstimator
from training.run.loop import LoopConfig, learning_rate_at, set_learning_rate, train_averaged

STAGE = "video-teacher"


@dataclass(frozen=True)
class VideoTeacherConfig:
    """Settings of the clip teacher's training."""

    loop: LoopConfig = LoopConfig(steps=2600, log_every=10)
    batch_size: int = 6
    frames: int = 3
    """Frames of a clip that an iteration trains on, before `whole_from`."""
    whole_from: float = 0.97
    """Share of the iterations after which clips are trained whole."""
    learning_rate: float = 3e-4
    """Rate of the picture model's weights."""
    motion_lr_scale: float = 4.0
    text_lr_scale: float = 2.0
    caption_dropout: float = 0.1
    high_noise_share: float = 0.65
    """Share of timesteps drawn from `high_noise_from` upwards. There a clip's motion is decided."""
    high_noise_from: int = 600
    spinning_share: float = 0.3
    """Share of clips that spin. A turned glyph is a new picture in each frame; other motions keep it upright."""
    one_way_until: float = 0.15
    """Share of the iterations before which `REVERSED` motions are left out. A motion and its reverse together have
    a mean without direction, from which training hardly moves; one of them alone shows the way of time."""
    ema_decay: float = 0.99
    precision: Precision = "fp32"


def draw_timesteps(config: VideoTeacherConfig, generator: torch.Generator) -> Tensor:
    """Draw whole timesteps [B], more of them at high noise."""
    low = torch.where(
        torch.rand(config.batch_size, generator=generator, dtype=torch.float64) < config.high_noise_share,
        float(config.high_noise_from),
        0.0,
    )
    share = torch.rand(config.batch_size, generator=generator, dtype=torch.float64)
    return (low + share * (COORDINATES.schedule.num_train_timesteps - low)).floor()


def draw_clips(config: VideoTeacherConfig, step: int, count: int, generator: torch.Generator) -> list[int]:
    """Draw the numbers of an iteration's clips, out of `count`."""
    is_one_way = step < config.one_way_until * config.loop.steps
    motions = [n for n, motion in enumerate(MOTIONS) if not (is_one_way and motion in REVERSED)]
    others = (1.0 - config.spinning_share) / (len(motions) - 1)
    shares = torch.tensor([config.spinning_share if MOTIONS[m] == "spinning" else others for m in motions])
    chosen = torch.multinomial(shares, config.batch_size, replacement=True, generator=generator).tolist()
    rounds = torch.randint(count // len(MOTIONS), (config.batch_size,), generator=generator).tolist()
    # Motions take turns in the stream of clips.
    return [a_round * len(MOTIONS) + motions[m] for a_round, m in zip(rounds, chosen, strict=True)]


def draw_frames(config: VideoTeacherConfig, step: int, generator: torch.Generator) -> list[int]:
    """Draw the frames that an iteration trains on, rising."""
    if step >= config.whole_from * config.loop.steps:
        return list(range(FRAMES))
    return sorted(torch.randperm(FRAMES, generator=generator)[: config.frames].tolist())


def train_video_teacher(folder: Path, clips_folder: Path, checkpoint: Path, config: VideoTeacherConfig) -> None:
    """Train or resume. Write `folder/{unet,text_encoder,tokenizer}` in diffusers layout.

    Args:
        checkpoint: Picture checkpoint that the clip model grows from.
    """
    torch.manual_seed(config.loop.seed)
    clips = LatentClips(clips_folder, config.loop.seed)
    tokenizer = CLIPTokenizer.from_pretrained(checkpoint / "tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(checkpoint / "text_encoder").float()
    unet = build_motion_unet(UNet2DConditionModel.from_pretrained(checkpoint / "unet").float())
    model = CleanEstimator(MotionUNetDenoiser(unet), COORDINATES, config.precision)
    modules = {"unet": unet, "text_encoder": text_encoder}
    unet.train()
    text_encoder.train()
    optimizer = _optimizer(config, unet, text_encoder)

    def loss_at(step: int, generator: torch.Generator) -> Tensor:
        set_learning_rate(optimizer, learning_rate_at(step, config.loop.steps, config.learning_rate, warmup=30))
        numbers = draw_clips(config, step, len(clips), generator)
        frames = draw_frames(config, step, generator)
        latents = clips.latents(numbers, frames)
        prompts, empty = (
            Conditioning(text_encoder(tokenize(tokenizer, texts))[0])
            for texts in (clips.captions(numbers, wording_seed=step), [""])
        )
        draws = DenoisingDraws(
            draw_timesteps(config, generator),
            torch.randn(config.batch_size, FRAME_SHAPE[0], len(frames), *FRAME_SHAPE[1:], generator=generator),
            torch.rand(config.batch_size, generator=generator) < config.caption_dropout,
        )
        with frames_shown(unet, frames):
            return denoising_loss_at(model, latents, prompts, empty, draws)

    averages = train_averaged(folder, STAGE, config.loop, modules, optimizer, loss_at, config.ema_decay)
    save_teacher(folder, averages["unet"], averages["text_encoder"], tokenizer)


def _optimizer(config: VideoTeacherConfig, unet: torch.nn.Module, text_encoder: torch.nn.Module) -> torch.optim.AdamW:
    motion = motion_parameters(unet)
    of_motion = {id(p) for p in motion}
    groups = [
        {"params": [p for p in unet.parameters() if id(p) not in of_motion], "lr_scale": 1.0},
        {"params": motion, "lr_scale": config.motion_lr_scale},
        {"params": list(text_encoder.parameters()), "lr_scale": config.text_lr_scale},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=1e-2)
