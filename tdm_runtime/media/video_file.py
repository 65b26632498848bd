"""Files of clips: MP4, WebM, animated WebP and GIF, and raw frames."""

from __future__ import annotations

import io
import itertools
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal, cast, get_args

import numpy as np
from PIL import Image, ImageSequence

from tdm_runtime.media.image_file import exif_comment
from tdm_runtime.model.decoder import Pixels

Container = Literal["mp4", "webm"]
"""Files of compressed video; they are written and read frame by frame."""
ClipFormat = Container | Literal["webp", "gif", "npy"]


@dataclass(frozen=True)
class Codec:
    """A codec and its container, as FFmpeg names them and their options."""

    name: str
    options: Mapping[str, str]
    """One thread, so that equal frames give equal bytes. The constant rate factor shows no loss."""
    container_options: Mapping[str, str]
    """The index comes first, so that players start before the end arrives."""


CODECS: Mapping[Container, Codec] = {
    "mp4": Codec("libx264", {"crf": "16", "preset": "medium", "threads": "1"}, {"movflags": "+faststart"}),
    "webm": Codec(
        "libvpx-vp9",
        {"crf": "20", "b": "0", "deadline": "good", "cpu-used": "4", "row-mt": "0", "threads": "1"},
        {"cues_to_front": "1"},
    ),
}
"""H.264 with a rate factor of 0..51, a tenth of the size of PNG files; VP9 with one of 0..63."""
BT709 = 1
"""FFmpeg's number of the BT.709 colour space."""
LIMITED_RANGE = 1
"""FFmpeg's number of the limited range, luma 16..235."""


def encode_clip(
    frames: Iterable[Pixels], fps: int, width: int, height: int, comment: str = "", container_format: Container = "mp4"
) -> bytes:
    """Encode a clip in yuv420p, see `CODECS`.

    The same frames give the same bytes: one thread, no date in the file, and no AVX-512, because x264's look-ahead
    with it reads memory that nothing has written (x264 core 165, seen with B-frames and mbtree).

    Args:
        frames: uint8 [H, W, 3] each, or one array [F, H, W, 3]; read one by one.
        fps: frames per second, a whole number.
        width, height: of every frame, pixels, even.
        comment: text to embed.
        container_format: mp4 is H.264, webm is VP9.
    """
    import av  # FFmpeg's libraries: heavy, and only clips need them
    import torch

    if width % 2 or height % 2:
        raise ValueError(f"frames are {width}x{height} pixels; yuv420p needs even sides")
    codec = CODECS[container_format]
    options = {**codec.container_options, "fflags": "+bitexact"}
    with tempfile.TemporaryDirectory() as folder:  # FFmpeg moves the index to the front of a finished file
        file = Path(folder) / "clip"
        with av.open(str(file), "w", format=container_format, options=options) as container:
            if comment:
                container.metadata["comment"] = comment
            settings = dict(codec.options)
            if codec.name == "libx264" and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
                settings["x264-params"] = "asm=avx2"
            track = container.add_stream(codec.name, rate=fps, options=settings)
            assert isinstance(track, av.VideoStream), "the codecs are of video"
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
    """Yield the frames of an MP4, WebM, animated WebP or GIF file, or a picture file's only one; uint8 [H, W, 3]."""
    if is_video(clip):
        import av

        with av.open(io.BytesIO(clip), "r") as container:
            for frame in container.decode(video=0):
                yield frame.to_ndarray(format="rgb24").astype(np.uint8, copy=False)
        return
    with Image.open(io.BytesIO(clip)) as animation:
        for shown in ImageSequence.Iterator(animation):
            yield np.asarray(shown.convert("RGB"))


def is_video(content: bytes) -> bool:
    """Return whether a file is a `Container`, by its first bytes."""
    return content[4:8] == b"ftyp" or content.startswith(b"\x1a\x45\xdf\xa3")


def read_receipt(clip: bytes) -> str:
    """Return the receipt that `encode_frames` wrote into an MP4 or WebM file; "" if it has none or is damaged."""
    import av

    try:
        with av.open(io.BytesIO(clip)) as container:
            tags = {name.lower(): text for name, text in container.metadata.items()}  # WebM has them in capitals
            return tags.get("comment", "").rpartition("\n")[2]
    except (av.FFmpegError, ValueError):
        return ""


def encode_frames(
    frames: Pixels, clip_format: ClipFormat, fps: int, parameters: str | None = None, receipt: str | None = None
) -> bytes:
    """Encode a clip. The comment of its file is the parameters and, as its last line, the receipt.

    Args:
        frames: uint8 [F, H, W, 3].
        clip_format: mp4 or webm (see `encode_clip`), webp (lossless, plays for ever), gif (256 colours a frame, plays
            for ever) or npy (the array itself, as numpy saves it; no fps).
        fps: frames per second.
        parameters: text to embed; npy holds none.
        receipt: JSON in one line to embed; npy holds none.
    """
    comment = "\n".join(filter(None, (parameters, receipt)))
    if clip_format in get_args(Container):
        container = cast(Container, clip_format)
        return encode_clip(frames, fps, frames.shape[2], frames.shape[1], comment, container)
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
