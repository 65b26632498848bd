"""Encode pictures or clips to latents, paired with embedded prompts by number.

GAN, LCM and fine-tuning learn from them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from tdm_runtime.checkpoint.stock.pipeline_folder import family_of
from tdm_runtime.errors import CheckpointError
from tdm_runtime.families import Family
from tdm_runtime.media.video_file import read_frames
from training.pretrained.prompts import (
    EmbeddingIndex,
    PromptError,
    StoredType,
    read_index,
    read_prompt_file,
    to_stored,
    write_json,
    write_tensors,
)

LATENTS_FILE = "latents.json"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
CLIP_SUFFIXES = (".mp4", ".webm", ".mov", ".gif", ".webp")


@dataclass(frozen=True)
class LatentEncoder:
    """VAE of a base and its family."""

    vae: Any
    family: Family

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Return latents as the denoiser reads them, float32: [B, C, h, w], of clips [B, C, F, h, w].

        Args:
            pixels: [B, 3, H, W], of clips [B, 3, frames, H, W], in [-1, 1].
        """
        return self.family.encode_pixels(self.vae, pixels)


def load_latent_encoder(base_folder: Path, device: str) -> LatentEncoder:
    """Load the VAE of a diffusers pipeline folder.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    family = family_of(base_folder)
    vae_class = getattr(diffusers, family.vae_classes[0])
    try:
        vae = vae_class.from_pretrained(base_folder / "vae", use_safetensors=True, local_files_only=True)
    except Exception as error:  # diffusers raises many kinds; a user can do the same about all of them
        raise CheckpointError(f"{base_folder / 'vae'} cannot be loaded: {error}; restore it from its source") from error
    vae = vae.float().eval().requires_grad_(False).to(device)
    return LatentEncoder(vae, family)


def encode_latents(
    base_folder: Path,
    images: Path,
    output_folder: Path,
    width: int,
    height: int,
    frames: int = 1,
    *,
    stored_type: StoredType = "fp16",
    batch_size: int = 4,
    device: str | None = None,
) -> int:
    """Encode a picture or clip for each prompt into the folder of their embeddings. A killed run continues.

    Args:
        images: a folder, whose pictures or clips sorted by name pair with the prompts in their order; or a prompt file
            with "image" on each line.
        output_folder: folder that `embed_prompts` wrote.
        width, height: size in pixels that pictures are scaled to cover, and then cropped to at the centre.
        frames: frames that are taken of each clip, evenly from its first to its last; pictures have 1.
        device: device of the VAE; by default CUDA if there is a CUDA device.

    Returns:
        The number of pictures or clips.

    Raises:
        PromptError: pictures and prompts do not pair, a picture cannot be read, or the family makes no such clips.
    """
    index = read_index(output_folder)
    family = family_of(base_folder)
    if (index.family, index.width, index.height) != (family.name, width, height):
        raise PromptError(
            f"{output_folder} holds embeddings of {index.family} at {index.width}x{index.height}, the latents are of "
            f"{family.name} at {width}x{height}; latents and embeddings must agree: give the base and the size of the "
            "embeddings"
        )
    if frames > 1 and not family.makes_clips:
        raise PromptError(f"frames is {frames} and {family.name} makes pictures; set frames to 1")
    suffixes = CLIP_SUFFIXES if family.makes_clips else IMAGE_SUFFIXES
    files = list_images(images, suffixes)
    if len(files) != index.count:
        kind = "clips" if family.makes_clips else "pictures"
        raise PromptError(
            f"{images} has {len(files)} {kind} ({', '.join(suffixes)}) for {index.count} prompts; give one for each"
        )
    _settle(output_folder, files, stored_type, frames)
    pending = [(file, rows) for file, rows in index.shards("latents", output_folder) if not file.is_file()]
    if not pending:
        return index.count
    encoder = load_latent_encoder(base_folder, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    kind = "clip" if family.makes_clips else "picture"
    bar = tqdm(total=sum(len(rows) for _, rows in pending), desc="encode", unit=kind, disable=None)
    for shard, rows in pending:
        parts = []
        for start in range(rows.start, rows.stop, batch_size):
            parts.append(_encode_files(encoder, files[start : min(start + batch_size, rows.stop)], index, frames))
            bar.update(len(parts[-1]))
        write_tensors(shard, {"latents": to_stored("latents", torch.cat(parts), stored_type)})
    bar.close()
    return index.count


def list_images(images: Path, suffixes: Sequence[str] = IMAGE_SUFFIXES) -> list[Path]:
    """Return the files of a folder sorted by name, or of a prompt file in the order of its lines.

    Raises:
        PromptError: a line names no picture.
    """
    if images.is_dir():
        return sorted(file for file in images.iterdir() if file.suffix.lower() in suffixes)
    files = []
    for number, row in enumerate(read_prompt_file(images), start=1):
        if row.image is None:
            raise PromptError(f'{images}, line {number} has no picture; add "image": "path", relative to the file')
        files.append(images.parent / row.image)
    return files


def read_pixels(file: Path, width: int, height: int) -> Tensor:
    """Return a picture, scaled to cover the size and cropped at the centre, [3, H, W] in [-1, 1].

    Raises:
        PromptError: the picture cannot be read.
    """
    try:
        with Image.open(file) as image:
            fitted = ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.LANCZOS)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise PromptError(f"{file} cannot be read as a picture ({error}); replace it or remove its prompt") from None
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).float() / 127.5 - 1.0


def read_clip(file: Path, width: int, height: int, frames: int) -> Tensor:
    """Return frames of a clip, scaled to cover the size and cropped at the centre, [3, frames, H, W] in [-1, 1].

    Args:
        frames: number of frames that are taken, evenly from the first to the last.

    Raises:
        PromptError: the clip cannot be read, or has fewer frames.
    """
    try:
        pictures = map(Image.fromarray, read_frames(file.read_bytes()))
        shown = [ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS) for picture in pictures]
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise PromptError(f"{file} cannot be read as a clip ({error}); replace it or remove its prompt") from None
    if len(shown) < frames:
        raise PromptError(f"{file} has {len(shown)} frames and {frames} are taken; replace it or remove its prompt")
    taken = [shown[round(n)] for n in np.linspace(0, len(shown) - 1, frames)]
    return torch.from_numpy(np.stack([np.array(frame) for frame in taken])).permute(3, 0, 1, 2).float() / 127.5 - 1


def _encode_files(encoder: LatentEncoder, files: Sequence[Path], index: EmbeddingIndex, frames: int) -> Tensor:
    size = (index.width, index.height)
    if encoder.family.makes_clips:
        pixels = torch.stack([read_clip(file, *size, frames) for file in files])
    else:
        pixels = torch.stack([read_pixels(file, *size) for file in files])
    return encoder.encode(pixels.to(encoder.vae.device)).cpu()


def _settle(folder: Path, files: Sequence[Path], stored_type: StoredType, frames: int) -> None:
    """Write down what the latents are made of, or check that an earlier run was made of the same."""
    names = hashlib.sha256("\n".join(str(file.resolve()) for file in files).encode()).hexdigest()
    plan = {"stored_type": stored_type, "pictures_sha256": names, "frames": frames}
    file = folder / LATENTS_FILE
    if not file.exists():
        write_json(file, plan)
    elif json.loads(file.read_text(encoding="utf-8")) != plan:
        raise PromptError(
            f"{file} is of other pictures, or of another number of frames or stored_type than {frames} and "
            f"{stored_type}; resume with the same, or remove {LATENTS_FILE} and latents-*.safetensors"
        )
