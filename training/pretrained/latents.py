"""Pictures -> latents, paired with embedded prompts by number: for GAN, LCM and fine-tuning, which learn from data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from tdm_runtime.errors import CheckpointError
from training.pretrained.base_model import Family, family_of
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


@dataclass(frozen=True)
class LatentEncoder:
    """A base's VAE, and its denoiser's units: latents of about unit spread."""

    vae: Any
    scaling_factor: float
    shift_factor: float

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, H, W] in [-1, 1] -> latents [B, C, h, w], float32, the mean of the VAE's distribution."""
        mean: Tensor = self.vae.encode(pixels).latent_dist.mode()
        return (mean - self.shift_factor) * self.scaling_factor


def load_latent_encoder(base_folder: Path, device: str) -> LatentEncoder:
    """Load the VAE of a diffusers pipeline folder.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    family: Family = family_of(base_folder)
    if family == "cogvideox":
        raise PromptError(
            f"{base_folder} is of cogvideox, whose VAE takes clips, and pictures are encoded here; "
            "use a data-free method (tdm without adversarial_weight) for video"
        )
    try:
        vae = AutoencoderKL.from_pretrained(base_folder / "vae", use_safetensors=True, local_files_only=True)
    except Exception as error:  # diffusers raises many kinds; all mean the same to a user
        raise CheckpointError(f"{base_folder / 'vae'} cannot be loaded: {error}; restore it from its source") from error
    vae = vae.float().eval().requires_grad_(False).to(device)
    return LatentEncoder(vae, float(vae.config.scaling_factor), float(vae.config.shift_factor or 0.0))


def encode_latents(
    base_folder: Path,
    images: Path,
    output_folder: Path,
    width: int,
    height: int,
    *,
    stored_type: StoredType = "fp16",
    batch_size: int = 4,
    device: str | None = None,
) -> int:
    """Encode a picture for each prompt into the folder of their embeddings. A killed run goes on where it stood.

    Args:
        images: a folder, whose pictures in the order of their names belong to the prompts in theirs; or a
            prompt file with "image" on each line.
        output_folder: where `embed_prompts` has been.
        width, height: pictures are scaled to cover that, in pixels, and cut in the middle.
        device: of the VAE; by default CUDA where there is one.

    Returns:
        The number of pictures.

    Raises:
        PromptError: pictures and prompts do not pair, or a picture cannot be read.
    """
    index = read_index(output_folder)
    if (index.family, index.width, index.height) != (family_of(base_folder), width, height):
        raise PromptError(
            f"{output_folder} holds embeddings of {index.family} at {index.width}x{index.height}, the latents are of "
            f"{family_of(base_folder)} at {width}x{height}; latents and embeddings must agree"
        )
    files = list_images(images)
    if len(files) != index.count:
        raise PromptError(f"{images} has {len(files)} pictures for {index.count} prompts; give one for each prompt")
    _settle(output_folder, files, stored_type)
    pending = [(file, rows) for file, rows in index.shards("latents", output_folder) if not file.is_file()]
    if not pending:
        return index.count
    encoder = load_latent_encoder(base_folder, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    bar = tqdm(total=sum(len(rows) for _, rows in pending), desc="encode", unit="picture", disable=None)
    for shard, rows in pending:
        parts = []
        for start in range(rows.start, rows.stop, batch_size):
            parts.append(_encode_files(encoder, files[start : min(start + batch_size, rows.stop)], index))
            bar.update(len(parts[-1]))
        write_tensors(shard, {"latents": to_stored("latents", torch.cat(parts), stored_type)})
    bar.close()
    return index.count


def list_images(images: Path) -> list[Path]:
    """The pictures of a folder by name, or of a prompt file by line.

    Raises:
        PromptError: a line names none.
    """
    if images.is_dir():
        return sorted(file for file in images.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
    files = []
    for number, row in enumerate(read_prompt_file(images), start=1):
        if row.image is None:
            raise PromptError(f'{images}, line {number} has no picture; add "image": "path", relative to the file')
        files.append(images.parent / row.image)
    return files


def read_pixels(file: Path, width: int, height: int) -> Tensor:
    """A picture scaled to cover the size and cut in the middle, [3, H, W] in [-1, 1].

    Raises:
        PromptError: it cannot be read.
    """
    try:
        with Image.open(file) as image:
            fitted = ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.LANCZOS)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise PromptError(f"{file} cannot be read as a picture ({error}); replace it or remove its prompt") from None
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).float() / 127.5 - 1.0


def _encode_files(encoder: LatentEncoder, files: Sequence[Path], index: EmbeddingIndex) -> Tensor:
    pixels = torch.stack([read_pixels(file, index.width, index.height) for file in files])
    return encoder.encode(pixels.to(encoder.vae.device)).cpu()


def _settle(folder: Path, files: Sequence[Path], stored_type: StoredType) -> None:
    """Note what the latents are of, or find that a run before meant the same."""
    names = hashlib.sha256("\n".join(str(file.resolve()) for file in files).encode()).hexdigest()
    plan = {"stored_type": stored_type, "pictures_sha256": names}
    file = folder / LATENTS_FILE
    if not file.exists():
        write_json(file, plan)
    elif json.loads(file.read_text(encoding="utf-8")) != plan:
        raise PromptError(
            f"{file} is of other pictures or of another stored_type than {stored_type}; resume with the same, "
            f"or remove {LATENTS_FILE} and latents-*.safetensors"
        )
