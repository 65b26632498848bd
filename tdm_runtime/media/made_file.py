"""The file of what a model made: a picture or a clip, with its parameters and its receipt inside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from tdm_runtime.media.image_file import ImageFormat, describe_parameters, encode_image
from tdm_runtime.media.provenance import Provenance
from tdm_runtime.media.receipt import Receipt
from tdm_runtime.media.video_file import ClipFormat, encode_frames
from tdm_runtime.model.decoder import Pixels
from tdm_runtime.model.loaded_model import LoadedModel
from tdm_runtime.params import SamplingParams

FileFormat = ImageFormat | ClipFormat
"""Of pictures or clips; a WebP file holds either."""


def encode_made(
    model: LoadedModel,
    params: SamplingParams,
    pixels: Pixels,
    file_format: FileFormat,
    *,
    receipt: Receipt | None,
    compression: int = 100,
    provenance: Provenance | None = None,
) -> bytes:
    """Encode a picture, or a clip at the frames per second of its request or of the recipe.

    Args:
        pixels: uint8 [H, W, 3], or [F, H, W, 3] if `params` are of a clip.
        file_format: an `ImageFormat` for pictures, a `ClipFormat` for clips.
        receipt: Written into the file with the parameters. None writes neither.
        compression: See `encode_image`.
        provenance: signs the file. `pixels` have its watermark already.
    """
    text = None if receipt is None else describe_parameters(params, model.recipe, model.digest)
    written = None if receipt is None else receipt.to_json()
    if params.frames is None:
        picture_format = cast(ImageFormat, file_format)
        content = encode_image(pixels, picture_format, compression=compression, parameters=text, receipt=written)
    else:
        fps = params.fps or model.recipe.fps
        assert fps is not None, "recipes of clips have fps"
        content = encode_frames(pixels, cast(ClipFormat, file_format), fps, text, written)
    return content if provenance is None else provenance.signed(content, file_format, params, receipt)


def frames_of(params: SamplingParams, pixels: Pixels) -> Sequence[Pixels]:
    """Return the frames of a clip or of its preview, or the picture alone; each uint8 [H, W, 3]."""
    return [pixels] if params.frames is None else list(pixels)
