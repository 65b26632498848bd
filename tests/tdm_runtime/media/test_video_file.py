"""Clip files: players can read them, they hold the given frames, and equal frames give equal bytes."""

from __future__ import annotations

import io
import math
import os
import subprocess
import sys

import av
import numpy as np
import pytest

from tdm_runtime.media.video_file import Container, encode_clip, encode_frames, read_receipt
from tdm_runtime.model.decoder import Pixels
from tdm_runtime.model.similarity import psnr_db

MIN_PSNR_DB = 38.0


def drawn(count: int, width: int = 96, height: int = 64) -> list[Pixels]:
    """Draw frames of a soft wave that moves."""
    x, y = np.meshgrid(np.arange(width) / width, np.arange(height) / height)
    phases = (math.tau * n / count for n in range(count))
    waves = [127 + 100 * np.stack([np.sin(3 * x + p), np.cos(2 * y - p), np.sin(x + y + p)], -1) for p in phases]
    return [wave.astype(np.uint8) for wave in waves]


@pytest.mark.parametrize(("container", "codec", "tag"), [("mp4", "h264", "comment"), ("webm", "vp9", "COMMENT")])
def test_frames_are_read_back_within_the_loss_of_the_codec(container: Container, codec: str, tag: str) -> None:
    frames = drawn(10)
    with av.open(io.BytesIO(encode_clip(iter(frames), 5, 96, 64, "a prompt", container))) as clip:
        (track,) = clip.streams
        assert isinstance(track, av.VideoStream)
        assert (track.codec_context.codec.canonical_name, track.codec_context.pix_fmt) == (codec, "yuv420p")
        assert (track.average_rate, clip.metadata[tag], clip.duration) == (5, "a prompt", 2 * av.time_base)
        shown = [frame.to_ndarray(format="rgb24") for frame in clip.decode(track)]
    assert len(shown) == len(frames)
    for found, frame in zip(shown, frames, strict=True):
        assert psnr_db(found, frame) > MIN_PSNR_DB


CUES, CLUSTER = b"\x1c\x53\xbb\x6b", b"\x1f\x43\xb6\x75"
"""Matroska's ids of the index and of the frames. The table of contents before both names the index only."""


@pytest.mark.parametrize(("container", "index", "content"), [("mp4", b"moov", b"mdat"), ("webm", CUES, CLUSTER)])
def test_equal_frames_give_equal_bytes_with_the_index_first(container: Container, index: bytes, content: bytes) -> None:
    clip = encode_clip(drawn(6), 6, 96, 64, container_format=container)
    assert clip == encode_clip(drawn(6), 6, 96, 64, container_format=container)
    assert clip.rindex(index) < clip.index(content)
    written = encode_frames(np.stack(drawn(2)), container, 6, "a cat\nSteps: 4", '{"seed": 7}')
    assert read_receipt(written) == '{"seed": 7}'
    assert read_receipt(written[:100]) == ""


MOVING_DISC = """
import hashlib
import numpy as np
from tdm_runtime.media.video_file import encode_clip
y, x = np.mgrid[:64, :64]
frames = [np.full((64, 64, 3), 250, np.uint8) for _ in range(8)]
for n, frame in enumerate(frames):
    frame[np.hypot(x - 32 - 4 * np.cos(0.8 * n), y - 32 - 4 * np.sin(0.8 * n)) < 20] = (220, 40, 60)
for container in ("mp4", "webm"):
    print(hashlib.sha256(encode_clip(frames, 4, 64, 64, "", container)).hexdigest())
"""


def test_the_bytes_do_not_depend_on_what_memory_held_before() -> None:
    """glibc fills new memory with the given byte. On a CPU with AVX-512, x264 gave another file for each."""
    made = {
        subprocess.run(
            [sys.executable, "-c", MOVING_DISC],
            env=os.environ | {"MALLOC_PERTURB_": fill},
            capture_output=True,
            check=True,
        ).stdout
        for fill in ("0", "77", "165")
    }
    assert len(made) == 1


def test_odd_sides_are_refused() -> None:
    with pytest.raises(ValueError, match="even sides"):
        encode_clip(drawn(1, width=63), 1, 63, 64)
