"""Stage `publish`: write the clip checkpoint, a folder that a stock `AnimateDiffPipeline` opens."""

from __future__ import annotations

from pathlib import Path

from diffusers import UNetMotionModel
from transformers import CLIPTextModel, CLIPTokenizer

from tdm_runtime.checkpoint.folder import open_checkpoint
from training.emoji.stages.publish import write_checkpoint
from training.emoji_video.student import build_video_recipe


def publish_video(folder: Path, picture_checkpoint: Path, teacher: Path, student: Path) -> None:
    """Assemble the clip checkpoint from the folders of the stages, with the autoencoders of the picture checkpoint."""
    pictures = open_checkpoint(picture_checkpoint)
    write_checkpoint(
        folder,
        build_video_recipe(),
        UNetMotionModel.from_pretrained(student / "unet"),
        pictures.load_vae(),
        CLIPTextModel.from_pretrained(teacher / "text_encoder"),
        CLIPTokenizer.from_pretrained(teacher / "tokenizer"),
        tiny_vae=pictures.load_tiny_vae() if pictures.has_tiny_vae else None,
    )
