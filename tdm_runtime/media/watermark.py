"""An invisible watermark in the pixels of pictures, written by the package invisible-watermark."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from tdm_runtime.model.decoder import Pixels

Watermark = Literal["dwtDctSvd"]
"""Method of a watermark, as `imwatermark.WatermarkDecoder.decode` names it."""
METHOD: Watermark = "dwtDctSvd"
MESSAGE = b"tdm-serve"
"""What the watermark says: `WatermarkDecoder("bytes", 72).decode(bgr, "dwtDctSvd")` returns it."""
MIN_PIXELS = 256 * 256
"""Fewest pixels of a picture that can hold a watermark."""
REMEDY = "pip install 'tdm-serve[provenance]'"


def watermark_of(width: int, height: int) -> Watermark | None:
    """Return the method for pictures of a size, in pixels; None if they are too small for a watermark."""
    return METHOD if width * height >= MIN_PIXELS else None


def with_watermark(pixels: Pixels) -> Pixels:
    """Return pictures with a watermark. Equal pixels give equal results on one machine.

    Args:
        pixels: uint8 [H, W, 3], or [F, H, W, 3]: each frame gets it. At least `MIN_PIXELS` each.

    Raises:
        ValueError: see `open_encoder`.
    """
    encoder = open_encoder()
    frames = pixels if pixels.ndim == 4 else pixels[None]
    marked = [encoder.encode(np.ascontiguousarray(frame[..., ::-1]), METHOD)[..., ::-1] for frame in frames]
    return np.ascontiguousarray(marked).reshape(pixels.shape)


def open_encoder() -> Any:
    """Return the package's encoder of our message.

    Raises:
        ValueError: the package is not installed, or a library that it needs; the message has the remedy.
    """
    try:
        from imwatermark import WatermarkEncoder
    except ImportError as error:
        raise ValueError(f"the watermark needs a package ({error}); {REMEDY}") from error
    return WatermarkEncoder(MESSAGE)
