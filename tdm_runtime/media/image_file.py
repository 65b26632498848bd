"""PNG, WebP and JPEG files, with the parameters of the picture as metadata."""

from __future__ import annotations

import io
import json
import re
import zlib
from typing import Literal

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tdm_runtime.checkpoint.recipe import Recipe
from tdm_runtime.model.decoder import Pixels
from tdm_runtime.params import SamplingParams

ImageFormat = Literal["png", "webp", "jpeg"]
RECEIPT_CHUNK = "tdm_receipt"
"""Name of the PNG text chunk that holds the receipt."""
EXIF_IFD = 0x8769
EXIF_USER_COMMENT = 0x9286


def encode_image(
    pixels: Pixels,
    image_format: ImageFormat,
    *,
    compression: int = 100,
    parameters: str | None = None,
    receipt: str | None = None,
) -> bytes:
    """Encode one picture.

    Args:
        pixels: uint8 [H, W, 3].
        compression: 0..100, the quality of jpeg and webp (webp 100 is lossless); png is always lossless.
        parameters: text to embed: PNG `parameters` chunk, EXIF UserComment elsewhere.
        receipt: JSON to embed. Only PNG holds it: the other formats change the pixels.
    """
    picture = Image.fromarray(pixels)
    stream = io.BytesIO()
    if image_format == "png":
        chunks = PngInfo()
        if parameters is not None:
            chunks.add_itxt("parameters", parameters)
        if receipt is not None:
            chunks.add_itxt(RECEIPT_CHUNK, receipt)
        # A quarter of the default's time for about its size.
        picture.save(stream, "PNG", pnginfo=chunks, compress_level=1, compress_type=zlib.Z_RLE)
        return stream.getvalue()
    exif = b"" if parameters is None else exif_comment(parameters)
    if image_format == "webp":
        picture.save(stream, "WEBP", quality=compression, lossless=compression == 100, exif=exif)
    else:
        picture.save(stream, "JPEG", quality=max(1, compression), subsampling=0, exif=exif)
    return stream.getvalue()


def exif_comment(comment: str) -> bytes:
    """Return EXIF data with a text as its UserComment."""
    exif = Image.Exif()
    exif.get_ifd(EXIF_IFD)[EXIF_USER_COMMENT] = b"UNICODE\0" + comment.encode("utf-16-be")
    return exif.tobytes()


def describe_parameters(params: SamplingParams, recipe: Recipe, digest: str) -> str:
    """Return the metadata text in the form that picture tools read ("prompt", newline, "Steps: 4, ...").

    They read a value with a comma or colon in it as JSON does a string.
    """
    prompt = " ".join(params.prompt.split())
    clip = "" if params.frames is None else f"Frames: {params.frames}, "
    guidance = next((scale for scale in (params.guidance_scale, recipe.guidance_scale) if scale is not None), 1)
    lora_scale = recipe.lora_scale if params.lora_scale is None else params.lora_scale
    lora = "" if lora_scale is None else f", LoRA scale: {lora_scale:g}"
    edit = "" if params.edit is None else f", Denoising strength: {params.edit.strength:g}"
    name = json.dumps(recipe.name, ensure_ascii=False) if re.search(r'[,:"\n]', recipe.name) else recipe.name
    return (
        f"{prompt}\nSteps: {params.num_inference_steps}, Sampler: {recipe.solver}, CFG scale: {guidance:g}, "
        f"Seed: {params.seed}, Size: {params.width}x{params.height}, {clip}"
        f"Model hash: {digest[:10]}, Model: {name}{lora}{edit}"
    )
