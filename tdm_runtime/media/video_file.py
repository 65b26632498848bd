"""Pictures -> one MP4 file."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

from tdm_runtime.model.decoder import Pixels

CRF = 16
"""x264's constant rate factor, 0..51: no loss that is seen, at a tenth of the pictures' size as PNG."""

BT709 = 1
"""How colours are written, by FFmpeg's numbers."""
LIMITED_RANGE = 1
"""Luma 16..235."""


def encode_clip(frames: Iterable[Pixels], fps: int, width: int, height: int, comment: str = "") -> bytes:
    """Encode a clip as H.264 in MP4: yuv420p, its index before its data, so that it plays while it is fetched.

    The same frames give the same bytes: one thread, and no date in the file.

    Args:
        frames: uint8 [H, W, 3] each; taken one by one, so they need not all be in memory.
        fps: frames per second, a whole number.
        width, height: of every frame, pixels, even.
        comment: text to embed.
    """
    import av  # FFmpeg's libraries, for those who make clips only

    if width % 2 or height % 2:
        raise ValueError(f"frames are {width}x{height}; H.264 as players read it wants even sides")
    options = {"movflags": "+faststart", "fflags": "+bitexact"}
    with tempfile.TemporaryDirectory() as folder:  # the index is put first by reading a finished file again
        file = Path(folder) / "clip.mp4"
        with av.open(str(file), "w", format="mp4", options=options) as container:
            if comment:
                container.metadata["comment"] = comment
            settings = {"crf": str(CRF), "preset": "medium", "threads": "1"}
            track = container.add_stream("libx264", rate=fps, options=settings)
            track.width, track.height, track.pix_fmt = width, height, "yuv420p"
            context = track.codec_context  # told, as players guess by the size where nothing says so
            context.colorspace = context.color_primaries = context.color_trc = BT709
            context.color_range = LIMITED_RANGE
            for index, pixels in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
                    format="yuv420p", dst_colorspace=BT709, dst_color_range=LIMITED_RANGE
                )
                frame.pts, frame.time_base = index, Fraction(1, fps)
                container.mux(track.encode(frame))
            container.mux(track.encode(None))
        return file.read_bytes()
