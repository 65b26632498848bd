"""Files of clips: MP4, animated WebP and GIF, and raw frames."""

from __future__ import annotations

import io
import itertools
import tempfile
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageSequence

from tdm_runtime.media.image_file import exif_comment
from tdm_runtime.model.decoder import Pixels

ClipFormat = Literal["mp4", "webp", "gif", "npy"]
CRF = 16
"""Constant rate factor of x264, 0..51. 16 shows no loss, at a tenth of the size of PNG files."""

BT709 = 1
"""FFmpeg's number of the BT.709 colour space."""
LIMITED_RANGE = 1
"""FFmpeg's number of the limited range, luma 16..235."""


def encode_clip(frames: Iterable[Pixels], fps: int, width: int, height: int, comment: str = "") -> bytes:
    """Encode a clip as H.264 in MP4, yuv420p. The index comes first, so that players start before the end arrives.

    The same frames give the same bytes: one thread, no date in the file, and no AVX-512, because x264's look-ahead
    with it reads memory that nothing has written (x264 core 165, seen with B-frames and mbtree).

    Args:
        frames: uint8 [H, W, 3] each, or one array [F, H, W, 3]; read one by one.
        fps: frames per second, a whole number.
        width, height: of every frame, pixels, even.
        comment: text to embed.
    """
    import av  # FFmpeg's libraries: heavy, and only clips need them
    import torch

    if width % 2 or height % 2:
        raise ValueError(f"frames are {width}x{height} pixels; H.264 in yuv420p needs even sides")
    options = {"movflags": "+faststart", "fflags": "+bitexact"}
    with tempfile.TemporaryDirectory() as folder:  # FFmpeg moves the index to the front of a finished file
        file = Path(folder) / "clip.mp4"
        with av.open(str(file), "w", format="mp4", options=options) as container:
            if comment:
                container.metadata["comment"] = comment
            settings = {"crf": str(CRF), "preset": "medium", "threads": "1"}
            if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
                settings["x264-params"] = "asm=avx2"
            track = container.add_stream("libx264", rate=fps, options=settings)
            track.width, track.height, track.pix_fmt = width, height, "yuv420p"
            context = track.codec_context  # without these fields players guess the colours by the size
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


def read_frames(clip: bytes) -> Iterator[Pixels]:
    """Yield the frames of an MP4, animated WebP or GIF file, uint8 [H, W, 3]."""
    if clip[4:8] == b"ftyp":
        import av

        with av.open(io.BytesIO(clip), "r") as container:
            for frame in container.decode(video=0):
                yield frame.to_ndarray(format="rgb24").astype(np.uint8, copy=False)
        return
    with Image.open(io.BytesIO(clip)) as animation:
        for shown in ImageSequence.Iterator(animation):
            yield np.asarray(shown.convert("RGB"))


def mp4_comment(clip: bytes) -> str:
    """Return the comment of an MP4 file; "" if it has none or is damaged."""
    import av

    try:
        with av.open(io.BytesIO(clip)) as container:
            return container.metadata.get("comment", "")
    except (av.FFmpegError, ValueError):
        return ""


def encode_frames(frames: Pixels, clip_format: ClipFormat, fps: int, comment: str = "") -> bytes:
    """Encode a clip.

    Args:
        frames: uint8 [F, H, W, 3].
        clip_format: mp4 (see `encode_clip`), webp (lossless, plays for ever), gif (256 colours a frame, plays for ever)
            or npy (the array itself, as numpy saves it; no fps).
        fps: frames per second.
        comment: text to embed; npy holds none.
    """
    if clip_format == "mp4":
        return encode_clip(frames, fps, frames.shape[2], frames.shape[1], comment)
    stream = io.BytesIO()
    if clip_format == "npy":
        np.save(stream, frames)
        return stream.getvalue()
    first, *others = (Image.fromarray(frame) for frame in frames)
    unit_ms = 10 if clip_format == "gif" else 1
    ends = [round(1000 * n / (fps * unit_ms)) for n in range(len(frames) + 1)]  # so that they add up to the whole
    shown_ms = [unit_ms * (end - start) for start, end in itertools.pairwise(ends)]
    animation = {"save_all": True, "append_images": others, "duration": shown_ms, "loop": 0}
    if clip_format == "gif":
        first.save(stream, "GIF", comment=comment.encode(), **animation)
    else:
        first.save(stream, "WEBP", lossless=True, exif=exif_comment(comment), **animation)
    return stream.getvalue()
