"""Receipts: all that is needed to make a picture again from its checkpoint, and the hash of its pixels."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
from PIL import Image, UnidentifiedImageError

from tdm_runtime.edit import Edit, GivenPicture
from tdm_runtime.errors import InvalidRequestError
from tdm_runtime.media.image_file import RECEIPT_CHUNK
from tdm_runtime.media.video_file import is_video, read_receipt
from tdm_runtime.media.watermark import Watermark, with_watermark
from tdm_runtime.model.decoder import Pixels
from tdm_runtime.model.loaded_model import LoadedModel
from tdm_runtime.params import DecoderName, PromptSyntax, SamplingParams

TOLERANCE_LEVELS = 2
"""Largest difference, in levels of 255, between a picture of a batch and the same picture made alone, if not strict."""


@dataclass(frozen=True)
class Receipt:
    """Receipt of one picture."""

    model: str
    digest: str
    """sha256 of the checkpoint's recipe and, through it, of its weights."""
    prompt: str
    seed: int
    num_inference_steps: int
    width: int
    height: int
    decoder: DecoderName
    backend: str
    """Backend and precision, such as "openvino bf16"."""
    bucket: tuple[int, ...]
    """Latent shape, [C, H, W] or [C, F, H, W]; samples of one shape and `references` can share calls."""
    is_strict: bool
    """Whether the picture has the same bits alone and in any batch, on this backend."""
    pixels_sha256: str
    """sha256 of the pixels as they were delivered, uint8 [H, W, 3] or [F, H, W, 3], row by row."""
    noise_angle: float = 0.0
    """See `SamplingParams`; not 0 in the frames of a walk through the noise."""
    guidance_scale: float | None = None
    """See `SamplingParams`."""
    lora_scale: float | None = None
    """Scale of the LoRA that was added to the base at run time; None without one."""
    frames: int | None = None
    """Number of frames of a clip; None for a picture."""
    threads: int | None = None
    """CPU threads of a call of the model, where the last bits depend on them: what torch makes on a CPU. None
    elsewhere, if the caller decided, and in receipts that are older than this field."""
    prompt_syntax: PromptSyntax = "plain"
    """See `SamplingParams`."""

    strength: float | None = None
    """See `Edit`; None for a picture that started from noise."""
    edit_sha256: str | None = None
    """`SamplingParams.edit_digest` of the given pictures."""
    watermark: Watermark | None = None
    """Watermark that the pixels have; None without one."""
    references: tuple[str, ...] = ()
    """Size of each reference picture as the model read it, "WxH"; empty without any."""

    def to_params(self, edit: Edit | None = None, references: tuple[GivenPicture, ...] = ()) -> SamplingParams:
        """Return the parameters that make the picture again.

        Args:
            edit: Picture that the receipt's one started from.
            references: Reference pictures of the receipt, fitted by the model's rule.

        Raises:
            InvalidRequestError: a value outside its limits, or the given picture is missing or another one.
        """
        params = SamplingParams(
            prompt=self.prompt,
            seed=self.seed,
            num_inference_steps=self.num_inference_steps,
            width=self.width,
            height=self.height,
            decoder=self.decoder,
            noise_angle=self.noise_angle,
            guidance_scale=self.guidance_scale,
            lora_scale=self.lora_scale,
            frames=self.frames,
            edit=edit,
            prompt_syntax=self.prompt_syntax,
            references=references,
        )
        if self.edit_sha256 != params.edit_digest:
            wanted = "starts from noise" if self.edit_sha256 is None else f"starts from {self.edit_sha256[:12]}"
            given = "none was given" if params.edit_digest is None else f"{params.edit_digest[:12]} was given"
            raise InvalidRequestError(
                f"the receipt's picture {wanted} and {given}; give its own pictures and mask with --image and --mask"
            )
        return params

    def to_json(self) -> str:
        return _ADAPTER.dump_json(self).decode()


_ADAPTER = pydantic.TypeAdapter(Receipt)


def receipt_of(
    model: LoadedModel, params: SamplingParams, pixels: Pixels, is_strict: bool, watermark: Watermark | None = None
) -> Receipt:
    """Return the receipt of a picture.

    Args:
        pixels: uint8 [H, W, 3] or [F, H, W, 3], with the watermark if there is one.
        is_strict, watermark: see `Receipt`.
    """
    return Receipt(
        model=model.recipe.name,
        digest=model.digest,
        prompt=params.prompt,
        seed=params.seed,
        num_inference_steps=params.num_inference_steps,
        width=params.width,
        height=params.height,
        decoder=params.decoder,
        backend=model.backend,
        bucket=model.latent_shape(params),
        is_strict=is_strict,
        pixels_sha256=pixels_sha256(pixels),
        noise_angle=params.noise_angle,
        guidance_scale=params.guidance_scale,
        lora_scale=None if model.recipe.lora_scale is None else model.lora_factor(params),
        frames=params.frames,
        prompt_syntax=params.prompt_syntax,
        threads=model.threads if _depends_on_threads(model) else None,
        strength=None if params.edit is None else params.edit.strength,
        edit_sha256=params.edit_digest,
        watermark=watermark,
        references=tuple(f"{width}x{height}" for width, height in (one.size for one in params.references)),
    )


def _depends_on_threads(model: LoadedModel) -> bool:
    """Whether the number of threads changes the last bits: on a CPU torch splits the sums of large layers by it."""
    return model.backend.startswith("torch") and model.denoiser.device.type == "cpu"


def pixels_sha256(pixels: Pixels) -> str:
    return hashlib.sha256(pixels.tobytes()).hexdigest()


@dataclass(frozen=True)
class Claim:
    """A receipt to verify, with the pixels of its PNG file where there is one."""

    receipt: Receipt
    pixels: Pixels | None = None

    def check(self, made: Pixels) -> str | None:
        """Return how a picture differs from the receipt; None if it agrees.

        Args:
            made: uint8 [H, W, 3] or [F, H, W, 3], without the watermark that the receipt's picture may have.

        Raises:
            ValueError: the receipt names a watermark, and its package is missing.
        """
        if self.receipt.watermark is not None:
            made = with_watermark(made)
        if pixels_sha256(made) == self.receipt.pixels_sha256:
            return None
        if self.receipt.is_strict:
            return f"its bits differ from the receipt's{self._doubt()}"
        if self.receipt.watermark is not None:
            return (
                "its bits differ from the receipt's, which promises no equal bits (is_strict is false), and a "
                "watermark makes small differences large"
            )
        if self.pixels is None:
            return (
                "its bits differ from the receipt's, which promises no equal bits (is_strict is false); "
                "verify the PNG file to see by how much"
            )
        levels = int(np.abs(made.astype(int) - self.pixels).max())
        return f"it is {levels} levels of 255 away" if levels > TOLERANCE_LEVELS else None

    def _doubt(self) -> str:
        """Return why equal bits cannot be expected; empty if they can."""
        receipt = self.receipt
        if receipt.backend.startswith("torch") and receipt.threads is None:
            return ", which names no number of threads: on a CPU the last bits depend on it"
        return ""


def read_claims(file: Path) -> list[Claim]:
    """Read the receipts of a file: a PNG, MP4 or WebM with one inside, a receipt in JSON, or a server's answer.

    Raises:
        InvalidRequestError: the file holds no receipt.
        OSError: the file cannot be read.
    """
    content = file.read_bytes()
    if content.startswith(b"\x89PNG"):
        claims = _claims_of_png(content)
    elif is_video(content):
        claims = list(_claims_of_json(read_receipt(content).encode()))
    else:
        claims = list(_claims_of_json(content))
    if not claims:
        raise InvalidRequestError(
            f"{file} holds no receipt; give a PNG, MP4 or WebM with metadata, a receipt in JSON or a server's answer"
        )
    return claims


def _claims_of_png(content: bytes) -> list[Claim]:
    try:
        with Image.open(io.BytesIO(content)) as picture:
            picture.load()
            text = getattr(picture, "text", {}).get(RECEIPT_CHUNK)
            pixels = np.asarray(picture.convert("RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError):
        return []
    return [] if text is None else [Claim(receipt, pixels) for receipt in _receipts_in(_decoded(text.encode()))]


def _claims_of_json(content: bytes) -> Iterator[Claim]:
    for receipt in _receipts_in(_decoded(content)):
        yield Claim(receipt)


def _decoded(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _receipts_in(raw: Any) -> Iterator[Receipt]:
    """Yield the receipts found anywhere inside decoded JSON."""
    if isinstance(raw, list):
        for item in raw:
            yield from _receipts_in(item)
    elif isinstance(raw, dict) and "pixels_sha256" in raw:
        try:
            yield _ADAPTER.validate_python(raw)
        except pydantic.ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise InvalidRequestError(f"the receipt's {where} is wrong: {first['msg']}") from None
    elif isinstance(raw, dict):
        for item in raw.values():
            yield from _receipts_in(item)
