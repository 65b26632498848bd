"""Picture files hold their pixels and, on request, the parameters that made them."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tdm_runtime.checkpoint.recipe import Recipe
from tdm_runtime.media.image_file import EXIF_IFD, EXIF_USER_COMMENT, ImageFormat, describe_parameters, encode_image
from tdm_runtime.model.decoder import Pixels
from tdm_runtime.params import MAX_PROMPT_CHARACTERS, SamplingParams
from tdm_runtime.sampling.schedule import DiffusionSchedule

JPEG_MEAN_ERROR = 2.0
"""Largest mean error in levels of 255, for smooth pictures at quality 95."""
TEXTS = [
    "a red apple\nSteps: 4, Seed: 7",
    "красное яблоко, 赤いリンゴ, تفاحة حمراء \U0001f34e",
    "naïve café",
    "\U0001f34e" * MAX_PROMPT_CHARACTERS,
    "",
]
formats = pytest.mark.parametrize("image_format", ["png", "webp", "jpeg"])


def noise_picture(height: int = 24, width: int = 40) -> Pixels:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth_picture() -> Pixels:
    rows, columns = np.mgrid[0:48, 0:64]
    return np.stack([rows * 4, columns * 3, 255 - rows - columns], axis=2).astype(np.uint8)


def opened(encoded: bytes) -> Image.Image:
    picture = Image.open(io.BytesIO(encoded))
    picture.load()
    return picture


def read_parameters(encoded: bytes) -> str | None:
    picture = opened(encoded)
    if picture.format == "PNG":
        return picture.info.get("parameters")
    comment = picture.getexif().get_ifd(EXIF_IFD).get(EXIF_USER_COMMENT)
    if comment is None:
        return None
    assert comment[:8] == b"UNICODE\0"
    text: str = comment[8:].decode("utf-16-be")
    return text


@pytest.mark.parametrize("image_format", ["png", "webp"])
@settings(max_examples=25, deadline=None)
@given(height=st.integers(1, 33), width=st.integers(1, 33), seed=st.integers(0, 9))
def test_lossless_formats_keep_every_pixel(image_format: ImageFormat, height: int, width: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    picture = opened(encode_image(pixels, image_format))
    assert picture.format == image_format.upper()
    np.testing.assert_array_equal(np.asarray(picture.convert("RGB")), pixels)


@pytest.mark.parametrize("compression", [0, 50, 100])
def test_png_is_lossless_at_any_compression(compression: int) -> None:
    pixels = noise_picture()
    np.testing.assert_array_equal(np.asarray(opened(encode_image(pixels, "png", compression=compression))), pixels)


def test_jpeg_is_close_at_high_quality() -> None:
    pixels = smooth_picture()
    picture = opened(encode_image(pixels, "jpeg", compression=95))
    assert (picture.format, picture.size, picture.mode) == ("JPEG", (64, 48), "RGB")
    error = np.abs(np.asarray(picture).astype(int) - pixels)
    assert error.mean() <= JPEG_MEAN_ERROR


@pytest.mark.parametrize("image_format", ["webp", "jpeg"])
def test_lower_quality_makes_smaller_files(image_format: ImageFormat) -> None:
    sizes = [len(encode_image(noise_picture(), image_format, compression=quality)) for quality in (0, 50, 95, 100)]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]


@formats
@pytest.mark.parametrize("text", TEXTS, ids=["newline", "non-Latin", "Latin-1", "long", "empty"])
def test_metadata_is_read_as_it_was_written(image_format: ImageFormat, text: str) -> None:
    assert read_parameters(encode_image(noise_picture(), image_format, parameters=text)) == text


@formats
def test_metadata_changes_no_pixel(image_format: ImageFormat) -> None:
    with_text = opened(encode_image(noise_picture(), image_format, parameters=TEXTS[0]))
    without = opened(encode_image(noise_picture(), image_format))
    np.testing.assert_array_equal(np.asarray(with_text), np.asarray(without))


@formats
def test_without_parameters_no_metadata_is_written(image_format: ImageFormat) -> None:
    encoded = encode_image(noise_picture(), image_format)
    assert read_parameters(encoded) is None
    assert "exif" not in opened(encoded).info
    assert b"parameters" not in encoded and b"UNICODE" not in encoded


@formats
def test_the_same_pixels_make_the_same_file(image_format: ImageFormat) -> None:
    first, second = (encode_image(noise_picture(), image_format, parameters=TEXTS[1]) for _ in range(2))
    assert first == second


def test_parameters_have_the_format_that_picture_tools_read() -> None:
    recipe = Recipe(
        name="tdm-emoji",
        prediction_type="v_prediction",
        noise_schedule=DiffusionSchedule(),
        solver="ddim",
        timesteps={2: (999.0, 499.0)},
        default_steps=2,
        native_sizes=((96, 64),),
    )
    params = SamplingParams(" a fox\n\tunder 木\r\nSteps: 9 ", 4294967295, 2, 96, 64)
    assert describe_parameters(params, recipe, "0123456789abcdef" * 4) == (
        "a fox under 木 Steps: 9\n"
        "Steps: 2, Sampler: ddim, CFG scale: 1, Seed: 4294967295, Size: 96x64, Model hash: 0123456789, Model: tdm-emoji"
    )
    named = describe_parameters(params, replace(recipe, name='ink, Steps: 99, Seed: 1 "x"'), "01234567")
    assert named.endswith(r'Model: "ink, Steps: 99, Seed: 1 \"x\""')
