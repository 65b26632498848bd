"""POST /v1/images/generations: what it reads and what it answers."""

from __future__ import annotations

import base64
import re
import secrets
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from serving.answers import ImageAnswer, ImageTimings, PartialAnswer, Usage
from serving.errors import invalid
from tdm_runtime.codec import ImageFormat
from tdm_runtime.delivery import Delivery, Preview
from tdm_runtime.params import MAX_PROMPT_CHARACTERS, MAX_SEED, DecoderName, SamplingParams
from tdm_runtime.receipt import Receipt
from tdm_runtime.recipe import Recipe

MAX_PICTURES = 10
MAX_BUDGET_MS = 600_000.0
SIZE_PATTERN = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", re.ASCII)

# What is checked with a better message than pydantic's is told to the readers of the schema here.
PROMPT_SCHEMA: dict[str, JsonValue] = {"minLength": 1, "maxLength": MAX_PROMPT_CHARACTERS, "pattern": r"\S"}
SIZE_SCHEMA: dict[str, JsonValue] = {"pattern": f"^(auto|{SIZE_PATTERN.pattern})$"}
SEED_SCHEMA: dict[str, JsonValue] = {"minimum": 0, "maximum": MAX_SEED}


class ImageRequest(BaseModel):
    """Body of POST /v1/images/generations. Names follow OpenAI; sampling fields follow diffusers."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str = Field(
        description=f"What the picture shows, 1..{MAX_PROMPT_CHARACTERS} characters.",
        json_schema_extra=PROMPT_SCHEMA,
    )
    model: str | None = Field(None, description="Model id from /v1/models; the served model by default.")
    n: int = Field(1, ge=1, le=MAX_PICTURES, description="Pictures; the i-th uses seed + i.")
    size: str = Field(
        "auto",
        description='"WxH" from the model\'s sizes, or "auto".',
        json_schema_extra=SIZE_SCHEMA,
    )
    seed: int | None = Field(
        None,
        description=f"0..{MAX_SEED}; drawn by the server when absent.",
        json_schema_extra=SEED_SCHEMA,
    )
    num_inference_steps: int | Literal["auto"] | None = Field(
        None, description='One of the model\'s step counts; "auto" takes as many as the budget, or the load, allows.'
    )
    min_inference_steps: int | None = Field(
        None, description='The fewest that "auto" may take; else the fewest there are.'
    )
    latency_budget_ms: float | None = Field(
        None, gt=0, le=MAX_BUDGET_MS, description="From arrival to answer: kept, or refused at once with 429."
    )
    strict: bool = Field(False, description="The same bits alone and in any company, on one backend.")
    decoder: DecoderName = Field("full", description="tiny decodes several times faster and a little softer.")
    guidance_scale: float | None = Field(None, description="Only 1: guidance is distilled into the weights.")
    negative_prompt: str | None = Field(None, description="Only empty: it needs guidance.")
    response_format: Literal["b64_json", "url"] = Field(
        "b64_json", description="url: the server keeps the file for a while; see expires_at."
    )
    output_format: ImageFormat = "png"
    output_compression: int = Field(100, ge=0, le=100, description="Quality of jpeg and webp.")
    metadata: bool = Field(True, description="Write prompt, seed and steps into the picture file.")
    user: str | None = Field(None, max_length=256, description="Accepted and unused.")
    stream: bool | None = Field(None, description="Server-sent events: partial images, then the picture; only n = 1.")
    partial_images: int | None = Field(None, ge=0, le=3, description="With stream: at most so many before the last.")
    draft: bool = Field(False, description="With partial_images: the first is the picture of one step.")
    quality: Literal["auto", "standard"] | None = Field(None, description="Only auto: steps are the quality dial.")
    background: Literal["auto", "opaque"] | None = Field(None, description="Pictures are opaque.")

    def to_sampling_params(self, recipe: Recipe) -> list[SamplingParams]:
        """One `SamplingParams` a picture.

        Args:
            recipe: of the model that the request names.

        Raises:
            InvalidRequestError, APIError: a value outside its limits.
        """
        if self.guidance_scale is not None and self.guidance_scale != 1.0:
            message = (
                f"guidance_scale is {self.guidance_scale}; {recipe.name} has guidance distilled in, only 1 is served"
            )
            raise invalid(message, "guidance_scale", "invalid_value")
        if self.negative_prompt:
            message = f"negative_prompt needs guidance, which {recipe.name} has distilled in; leave it out"
            raise invalid(message, "negative_prompt", "invalid_value")
        width, height = self._size(recipe)
        first_seed = secrets.randbelow(MAX_SEED + 1) if self.seed is None else self.seed
        steps = recipe.default_steps if self.num_inference_steps is None else self.num_inference_steps
        if steps == "auto":
            steps = recipe.step_counts[-1]
        params = SamplingParams(self.prompt, first_seed, steps, width, height, self.decoder)
        params.check_against(recipe)
        seeds = ((first_seed + n) % (MAX_SEED + 1) for n in range(self.n))
        return [replace(params, seed=seed) for seed in seeds]

    def cost(self, recipe: Recipe) -> float:
        """What the request takes of a quota, in megapixel-steps; the most it may take where steps are open.

        Raises:
            InvalidRequestError, APIError: a value outside its limits.
        """
        params = self.to_sampling_params(recipe)[0]
        return self.n * params.width * params.height * params.num_inference_steps / 1e6

    def to_delivery(self, recipe: Recipe, encoding_ms: float, on_preview: Callable[[Preview], None] | None) -> Delivery:
        """How its pictures are to be served.

        Args:
            encoding_ms: what encoding its files takes of the latency budget.
            on_preview: told of drafts and previews, where they are asked for.

        Raises:
            InvalidRequestError, APIError: fields that contradict each other.
        """
        is_auto = self.num_inference_steps == "auto"
        if self.min_inference_steps is not None and not is_auto:
            message = f'min_inference_steps is {self.min_inference_steps}; it needs num_inference_steps "auto"'
            raise invalid(message, "min_inference_steps", "invalid_value")
        partial_images = self.partial_images or 0
        if partial_images and not self.stream:
            message = f"partial_images is {partial_images}; they are sent as they come, which needs stream true"
            raise invalid(message, "partial_images", "invalid_value")
        if self.draft and not partial_images:
            raise invalid("draft is true; it is a partial image, ask for partial_images", "draft", "invalid_value")
        if self.stream and self.n != 1:
            raise invalid(f"n is {self.n}; a stream carries one picture, send {self.n} requests", "n", "invalid_value")
        if self.stream and self.response_format == "url":
            message = "response_format is 'url'; a stream carries its pictures, leave it out or send stream false"
            raise invalid(message, "response_format", "invalid_value")
        return Delivery(
            latency_budget_ms=self.latency_budget_ms,
            encoding_ms=0.0 if self.latency_budget_ms is None else encoding_ms,
            min_inference_steps=(self.min_inference_steps or recipe.step_counts[0]) if is_auto else None,
            strict=self.strict,
            on_preview=on_preview if partial_images else None,
            num_previews=partial_images - self.draft,
            draft=self.draft,
        )

    def _size(self, recipe: Recipe) -> tuple[int, int]:
        if self.size == "auto":
            return recipe.native_sizes[0]
        match = SIZE_PATTERN.fullmatch(self.size)
        if match is None:
            sizes = ", ".join(f"{width}x{height}" for width, height in recipe.native_sizes)
            raise invalid(
                f'size is {self.size[:32]!r}; write "WxH" or "auto", {recipe.name} makes {sizes}',
                "size",
                "invalid_value",
            )
        return int(match[1]), int(match[2])


class GeneratedImage(BaseModel):
    """One picture."""

    b64_json: str | None = None
    url: str | None = None
    """Where it is fetched from, without a key, until it expires."""
    expires_at: int | None = None
    """Of the URL, Unix seconds."""
    revised_prompt: str | None = None
    """Always null: prompts are read as they are."""
    seed: int
    num_inference_steps: int
    """That were taken."""
    is_cached: bool
    """Whether it was made for an earlier request."""
    receipt: Receipt
    """What made it; `tdm-generate --verify` makes it again."""


class ImageResponse(BaseModel):
    """Answer of POST /v1/images/generations."""

    created: int
    data: list[GeneratedImage]
    model: str
    output_format: ImageFormat
    size: str
    background: Literal["opaque"] = "opaque"
    usage: Usage
    timings: ImageTimings
    predicted_ms: float
    """What `timings.total_ms` was expected to be when the first step was due."""
    latency_budget_kept: bool | None
    """None where there was none."""
    warnings: list[str] = []


class ImageEvent(BaseModel):
    """What a stream's events have in common."""

    b64_json: str
    created_at: int
    size: str
    quality: Literal["auto"] = "auto"
    background: Literal["opaque"] = "opaque"
    output_format: ImageFormat


class PartialImage(ImageEvent):
    """Event `image_generation.partial_image`."""

    type: Literal["image_generation.partial_image"] = "image_generation.partial_image"
    partial_image_index: int
    is_draft: bool
    """The picture of one step; otherwise what a step of the picture itself expects."""
    num_steps_taken: int


class CompletedImage(ImageEvent):
    """Event `image_generation.completed`: what `ImageResponse` says of its one picture."""

    type: Literal["image_generation.completed"] = "image_generation.completed"
    seed: int
    num_inference_steps: int
    is_cached: bool
    receipt: Receipt
    usage: Usage
    model: str
    timings: ImageTimings
    predicted_ms: float
    latency_budget_kept: bool | None
    warnings: list[str]


def to_base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def to_response(answer: ImageAnswer, urls: list[str] | None, expires_at: int | None = None) -> ImageResponse:
    """An answer as JSON.

    Args:
        urls: of the pictures, in their order; None puts them into the answer.
        expires_at: when the URLs do, Unix seconds.
    """
    return ImageResponse(
        created=answer.created,
        data=[
            GeneratedImage(
                b64_json=to_base64(image.content) if urls is None else None,
                url=None if urls is None else urls[n],
                expires_at=expires_at,
                seed=image.seed,
                num_inference_steps=image.num_inference_steps,
                is_cached=image.is_cached,
                receipt=image.receipt,
            )
            for n, image in enumerate(answer.images)
        ],
        model=answer.model,
        output_format=answer.output_format,
        size=answer.size,
        usage=answer.usage,
        timings=answer.timings,
        predicted_ms=answer.predicted_ms,
        latency_budget_kept=answer.latency_budget_kept,
        warnings=answer.warnings,
    )


def to_event(answer: PartialAnswer | ImageAnswer) -> PartialImage | CompletedImage:
    """A part of a stream as its event."""
    if isinstance(answer, PartialAnswer):
        return PartialImage(
            b64_json=to_base64(answer.content),
            created_at=answer.created,
            size=f"{answer.width}x{answer.height}",
            output_format=answer.output_format,
            partial_image_index=answer.index,
            is_draft=answer.is_draft,
            num_steps_taken=answer.num_steps_taken,
        )
    (image,) = answer.images
    return CompletedImage(
        b64_json=to_base64(image.content),
        created_at=answer.created,
        size=answer.size,
        output_format=answer.output_format,
        seed=image.seed,
        num_inference_steps=image.num_inference_steps,
        is_cached=image.is_cached,
        receipt=image.receipt,
        usage=answer.usage,
        model=answer.model,
        timings=answer.timings,
        predicted_ms=answer.predicted_ms,
        latency_budget_kept=answer.latency_budget_kept,
        warnings=answer.warnings,
    )
