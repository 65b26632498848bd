"""Builds answers from the pictures that the engine made."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import cast, get_args

from serving.schema.answers import ImageTimings, InputTokenDetails, MadeImage, PartialAnswer, Usage
from serving.schema.order import ImageEncoding, ImageOrder
from tdm_runtime.engine.delivery import Preview
from tdm_runtime.engine.sample import Picture, Timings
from tdm_runtime.media.image_file import ImageFormat, encode_image
from tdm_runtime.media.made_file import encode_made, frames_of
from tdm_runtime.media.provenance import Provenance
from tdm_runtime.media.receipt import receipt_of
from tdm_runtime.model.loaded_model import LoadedModel
from tdm_runtime.model.text_encoder import PromptEmbedding
from tdm_runtime.scheduling.cost_model import Kind


def to_images(
    model: LoadedModel, pictures: Sequence[Picture], encoding: ImageEncoding, provenance: Provenance
) -> list[MadeImage]:
    """Return the pictures as files, or as bare pixels, with seeds and receipts."""
    images = []
    for picture in pictures:
        params, pixels = picture.params, provenance.marked(picture.pixels)
        watermark = provenance.watermark_of(params.width, params.height)
        receipt = receipt_of(model, params, pixels, picture.is_strict, watermark)
        if encoding.pixels_only:
            content = pixels.tobytes()
        else:
            content = encode_made(
                model,
                params,
                pixels,
                encoding.output_format,
                receipt=receipt if encoding.metadata else None,
                compression=encoding.compression,
                provenance=provenance,
            )
        steps = params.num_inference_steps, params.num_steps
        images.append(MadeImage(content, params.seed, *steps, picture.is_cached, receipt))
    return images


def to_partial(preview: Preview, index: int, encoding: ImageEncoding, provenance: Provenance) -> PartialAnswer:
    """Return a draft or preview as a file; of a clip the first frame."""
    output_format: ImageFormat = "png"
    if encoding.output_format in get_args(ImageFormat):
        output_format = cast(ImageFormat, encoding.output_format)
    first, *_ = frames_of(preview.params, preview.pixels)
    content = encode_image(provenance.marked(first), output_format, compression=encoding.compression)
    return PartialAnswer(
        content=provenance.signed(content, output_format, preview.params),
        index=index,
        created=int(time.time()),
        output_format=output_format,
        width=preview.params.width,
        height=preview.params.height,
        is_draft=preview.is_draft,
        num_steps_taken=preview.num_steps_taken,
    )


def to_usage(model: LoadedModel, pictures: Sequence[Picture]) -> Usage:
    """Return the number of tokens that were read and of latent positions that were made."""
    first = pictures[0]
    text_tokens = min(first.prompt.num_tokens, first.prompt.max_tokens)
    image_tokens = sum(math.prod(shape[1:]) for shape in model.reference_shapes(first.params))
    output_tokens = math.prod(model.latent_shape(first.params)[1:]) * len(pictures)
    return Usage(
        input_tokens=text_tokens + image_tokens,
        input_tokens_details=InputTokenDetails(text_tokens, image_tokens),
        output_tokens=output_tokens,
        total_tokens=text_tokens + image_tokens + output_tokens,
    )


def to_timings(slowest: Timings, waited_ms: float, encode_ms: float, total_ms: float) -> ImageTimings:
    """Return the timings of a request's slowest picture. The wait before submission counts as queue time."""
    return ImageTimings(
        queue_ms=waited_ms + slowest.queue_ms,
        text_ms=slowest.text_ms,
        steps_ms=slowest.steps_ms,
        decode_ms=slowest.decode_ms,
        encode_ms=encode_ms,
        total_ms=total_ms,
        image_ms=slowest.image_ms,
    )


def encoding_kind(order: ImageOrder) -> Kind:
    """Return the kind under which the engine learns how long files of this format and size take to encode."""
    first = order.pictures[0]
    shape = (first.height, first.width) if first.frames is None else (first.frames, first.height, first.width)
    return Kind(f"encode:{order.encoding.output_format}", shape)


def to_warnings(prompt: PromptEmbedding) -> list[str]:
    """Return what the client should know about its prompt."""
    if not prompt.is_truncated:
        return []
    return [f"the prompt has {prompt.num_tokens} tokens; the model read the first {prompt.max_tokens}"]
