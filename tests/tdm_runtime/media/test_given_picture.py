"""Picture files of clients: what is read, how, and that hostile ones are refused before they cost memory."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tdm_runtime.errors import InvalidRequestError
from tdm_runtime.media.given_picture import MAX_GIVEN_SIDE, distorts, has_transparency, read_mask, read_picture, to_edit

RED, BLUE = (255, 0, 0), (0, 0, 255)


def file_of(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def left_red() -> Image.Image:
    """Return a picture of 20x10, red on its left and blue on its right."""
    picture = Image.new("RGB", (20, 10), BLUE)
    picture.paste(RED, (0, 0, 10, 10))
    return picture


def png_that_claims(width: int, height: int) -> bytes:
    """Return a PNG file of a few bytes whose header names a size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_every_format_is_read(kind: str) -> None:
    pixels = np.asarray(read_picture(file_of(left_red(), kind)))
    assert pixels.shape == (10, 20, 3)
    assert pixels[5, 3, 0] > 200 and pixels[5, 16, 2] > 200


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    pixels = np.asarray(read_picture(file_of(left_red(), "JPEG", exif=exif, quality=100)))
    assert pixels.shape == (20, 10, 3) and pixels[2, 5, 0] > 200 and pixels[17, 5, 2] > 200


def test_transparent_parts_become_white() -> None:
    picture = left_red().convert("RGBA")
    picture.paste((0, 0, 0, 0), (0, 0, 10, 10))
    content = file_of(picture)
    assert np.asarray(read_picture(content))[5, 3].tolist() == [255, 255, 255]
    assert has_transparency(content) and not has_transparency(file_of(left_red()))
    palette = picture.quantize(8)
    assert np.asarray(read_picture(file_of(palette, "GIF", transparency=palette.getpixel((2, 2)))))[5, 3].min() == 255


def test_other_pixel_formats_are_converted() -> None:
    grey = np.tile(np.linspace(0, 65535, 20).astype(np.uint16), (10, 1))
    pixels = np.asarray(read_picture(file_of(Image.fromarray(grey))))
    assert (
        pixels[0, 0].tolist() == [0, 0, 0]
        and pixels[0, -1].tolist() == [255, 255, 255]
        and 120 < pixels[0, 10, 0] < 140
    )
    assert np.asarray(read_picture(file_of(left_red().convert("CMYK"), "JPEG")))[5, 3, 0] > 200
    assert np.asarray(read_picture(file_of(left_red().convert("1"))))[5, 3].tolist() in ([0] * 3, [255] * 3)


def test_of_an_animation_the_first_frame_is_read() -> None:
    frames = [Image.new("RGB", (8, 8), RED), Image.new("RGB", (8, 8), BLUE)]
    content = file_of(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.asarray(read_picture(content))[4, 4].tolist() == [255, 0, 0]


def test_a_mask_is_its_transparency_or_else_its_brightness() -> None:
    white_left = Image.new("L", (20, 10), 0)
    white_left.paste(255, (0, 0, 10, 10))
    clear_left = left_red().convert("RGBA")
    clear_left.paste((9, 9, 9, 0), (0, 0, 10, 10))
    for content in (file_of(white_left), file_of(white_left.convert("RGBA")), file_of(clear_left)):
        mask = np.asarray(read_mask(content))
        assert (mask[:, :10] == 255).all() and (mask[:, 10:] == 0).all()


GOOD = file_of(left_red())
HOSTILE = {
    "empty": b"",
    "text": b"hello, I am a picture",
    "html": b"<html><img src=http://example.com/x.png></html>",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg' width='10' height='10'/>",
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
    "truncated": GOOD[:-30],
    "only a signature": GOOD[:8],
    "damaged": GOOD[:40] + bytes(20) + GOOD[60:],
    "jpeg cut in half": file_of(left_red().resize((400, 300)), "JPEG")[:2000],
    "claims to be huge": png_that_claims(60000, 60000),
    "claims more than 2^31": png_that_claims(2**31 - 1, 2**31 - 1),
    "claims to be long": png_that_claims(MAX_GIVEN_SIDE + 1, 1),
    "claims more than it has": png_that_claims(4096, 4096),
    "zip": b"PK\x03\x04" + bytes(100),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("read", [read_picture, read_mask])
def test_a_hostile_file_is_refused_in_a_sentence(name: str, read: object) -> None:
    assert callable(read)
    with pytest.raises(InvalidRequestError) as refused:
        read(HOSTILE[name])
    assert refused.value.param in ("image", "mask")
    assert str(refused.value).startswith(("image ", "mask "))
    assert str(refused.value).endswith(("send one of these", "send the whole file", "scale it down"))


def test_a_huge_size_costs_no_memory() -> None:
    tracemalloc.start()
    try:
        with pytest.raises(InvalidRequestError, match="far too large; at most 16777216 pixels and 16384 along a side"):
            read_picture(HOSTILE["claims to be huge"])
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_bytes_after_the_picture_are_ignored(tmp_path: Path) -> None:
    assert read_picture(GOOD + b"PK\x03\x04 and more").size == (20, 10)


def test_picture_and_mask_are_scaled_to_the_size_to_make() -> None:
    mask = Image.new("L", (20, 10), 0)
    mask.paste(255, (0, 0, 10, 10))
    edit = to_edit(left_red(), 0.5, 48, 24, mask)
    assert edit.pixels.shape == (24, 48, 3) and edit.mask is not None and (edit.mask[:, :24] == 255).all()
    assert edit.pixels[12, 5].tolist() == [255, 0, 0] and not edit.mask[:, 24:].any()
    assert not distorts(left_red(), 48, 24) and distorts(left_red(), 48, 48)
    with pytest.raises(InvalidRequestError, match="the mask is 9x9 and the picture 20x10; send one size"):
        to_edit(left_red(), 0.5, 48, 24, Image.new("L", (9, 9)))
