"""Request of POST /v1/images/generations."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue

from serving.errors import invalid
from serving.schema.hints import prompt_warnings
from serving.schema.order import DeliveryOptions, ImageEncoding, ImageOrder, ResponseFormat
from serving.schema.parsing import nullable, parse_body, validate
from serving.schema.prompt_tags import with_lora
from tdm_runtime.checkpoint.recipe import MAX_GUIDANCE_SCALE, Recipe
from tdm_runtime.edit import Edit, GivenPicture
from tdm_runtime.media.image_file import ImageFormat
from tdm_runtime.params import (
    MAX_LORA_SCALE,
    MAX_PROMPT_CHARACTERS,
    MAX_SEED,
    DecoderName,
    PromptSyntax,
    SamplingParams,
)

MAX_PICTURES = 10
MAX_BUDGET_MS = 600_000.0
SIZE_PATTERN = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", re.ASCII)

# Limits that are checked elsewhere, with better messages than Pydantic's. Here they document the schema.
PROMPT_SCHEMA: dict[str, JsonValue] = {"minLength": 1, "maxLength": MAX_PROMPT_CHARACTERS, "pattern": r"\S"}
SIZE_SCHEMA: dict[str, JsonValue] = {"pattern": f"^(auto|{SIZE_PATTERN.pattern})$"}
SEED_SCHEMA: dict[str, JsonValue] = {"minimum": -1, "maximum": MAX_SEED}
Seed = Annotated[int | None, AfterValidator(lambda seed: None if seed == -1 else seed)]
"""A seed, or None to draw one, for which many clients send -1."""


class ImageRequest(BaseModel):
    """Body of POST /v1/images/generations. Names follow OpenAI; sampling fields follow diffusers."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra=nullable)

    prompt: str = Field(
        description=f"What the picture shows, 1..{MAX_PROMPT_CHARACTERS} characters.",
        json_schema_extra=PROMPT_SCHEMA,
    )
    prompt_syntax: PromptSyntax = Field(
        "plain", description="a1111 reads (word:1.3), [word], BREAK and <lora:name:0.8>, for models with CLIP."
    )
    model: str | None = Field(None, description="Model id from /v1/models; the served model by default.")
    n: int = Field(1, ge=1, le=MAX_PICTURES, description="Pictures; the i-th uses seed + i.")
    size: str = Field(
        "auto",
        description='"WxH" from the model\'s sizes, or "auto".',
        json_schema_extra=SIZE_SCHEMA,
    )
    seed: Seed = Field(
        None,
        description=f"0..{MAX_SEED}; drawn by the server when absent or -1.",
        json_schema_extra=SEED_SCHEMA,
    )
    num_inference_steps: int | Literal["auto"] | None = Field(
        None,
        description='One of the model\'s step counts; "auto" takes as many as the latency budget and the load allow.',
    )
    min_inference_steps: int | None = Field(
        None, description='Fewest steps that "auto" may take; by default the model\'s smallest step count.'
    )
    latency_budget_ms: float | None = Field(
        None,
        gt=0,
        le=MAX_BUDGET_MS,
        description="Longest time from arrival to answer. A request that cannot meet it is refused at once.",
    )
    strict: bool = Field(False, description="The same bits alone and in any batch, on one backend.")
    decoder: DecoderName = Field("full", description="tiny is several times faster and its pictures a little softer.")
    guidance_scale: float | None = Field(
        None,
        ge=0,
        le=MAX_GUIDANCE_SCALE,
        description="Guidance scale of a model that reads one; 0 or 1 where guidance is distilled into the weights.",
    )
    lora_scale: float | None = Field(
        None,
        ge=-MAX_LORA_SCALE,
        le=MAX_LORA_SCALE,
        description="Scale of the model's LoRA; by default the one that it is served with.",
    )
    negative_prompt: str | None = Field(None, description="Only empty: it needs guidance.")
    response_format: ResponseFormat = Field("b64_json", description="url: the server keeps the file until expires_at.")
    output_format: ImageFormat = "png"
    output_compression: int = Field(100, ge=0, le=100, description="Quality of jpeg and webp.")
    metadata: bool = Field(True, description="Write prompt, seed and steps into the picture file.")
    user: str | None = Field(None, max_length=256, description="Accepted and unused.")
    stream: bool | None = Field(
        None, description="Answer with server-sent events: partial images, then the picture; needs n = 1."
    )
    partial_images: int | None = Field(
        None, ge=0, le=3, description="With stream: most partial images before the picture."
    )
    draft: bool = Field(False, description="With partial_images: the first one is the picture of one step.")
    quality: Literal["auto", "standard", "hd", "low", "medium", "high"] | None = Field(
        None, description="Accepted; others than auto and standard get a warning, because steps are the quality dial."
    )
    style: Literal["vivid", "natural"] | None = Field(None, description="Accepted and unused, with a warning.")
    moderation: Literal["auto", "low"] | None = Field(None, description="Accepted and unused.")
    safety_identifier: str | None = Field(None, max_length=256, description="Accepted and unused.")
    background: Literal["auto", "opaque"] | None = Field(None, description="Pictures are opaque.")

    def as_file(self, formats: Sequence[ImageFormat]) -> Self:
        """Return the same request, answered with the bytes of one file.

        Args:
            formats: formats that the client accepts, the best first.

        Raises:
            APIError: 400, the request contradicts that.
        """
        if self.n != 1 or self.stream:
            param = "n" if self.n != 1 else "stream"
            message = f"{param} is {getattr(self, param)!r}; Accept: image/{formats[0]} gets one picture's bytes"
            raise invalid(f"{message}, accept application/json for more", param, "invalid_value")
        if self.response_format == "url":
            message = f"response_format is 'url' and Accept says image/{formats[0]}; accept application/json for a URL"
            raise invalid(message, "response_format", "invalid_value")
        if "output_format" not in self.model_fields_set:
            return self.model_copy(update={"output_format": formats[0]})
        if self.output_format not in formats:
            message = f"output_format is {self.output_format!r} and Accept says image/{formats[0]}; leave one out"
            raise invalid(message, "output_format", "invalid_value")
        return self

    def to_order(
        self, recipe: Recipe, default_seed: int | None = None, frames: int | None = None, fps: int | None = None
    ) -> ImageOrder:
        """Check the request against its model and draw its seed.

        Args:
            recipe: recipe of the model that the request names.
            default_seed: seed of a request that has none. None draws one.
            frames, fps: of a clip; None for a picture.

        Raises:
            InvalidRequestError, APIError: a value is outside its limits, or fields contradict each other.
        """
        if self.negative_prompt:
            message = f"negative_prompt needs guidance, which {recipe.name} has distilled in; leave it out"
            raise invalid(message, "negative_prompt", "invalid_value")
        if recipe.frames is not None and frames is None:
            message = f"model is {recipe.name!r}, which makes clips; send the request to /v1/videos/generations"
            message += ", or over gRPC to VideoService"
            raise invalid(message, "model", "invalid_value")
        pictures = self._pictures(recipe, default_seed, frames, fps)
        encoding = ImageEncoding(self.output_format, self.output_compression, self.metadata, self.response_format)
        return ImageOrder(recipe.name, pictures, self._delivery(recipe), encoding, tuple(self._warnings(recipe)))

    def _warnings(self, recipe: Recipe) -> Iterator[str]:
        """Yield what the client should know: fields and words that change nothing, and seeds that wrap."""
        if self.quality not in (None, "auto", "standard"):
            yield f"quality {self.quality} changes nothing; num_inference_steps is the quality dial"
        if self.style is not None:
            yield f"style {self.style} changes nothing; describe the style in the prompt"
        if self.output_format == "png" and "output_compression" in self.model_fields_set:
            yield "output_compression changes nothing in a png, which loses nothing; choose webp or jpeg"
        if self.seed is not None and self.seed + self.n - 1 > MAX_SEED:
            yield f"seed {self.seed} is less than n below the largest seed; the pictures after it go on from seed 0"
        if self.prompt_syntax == "plain":
            yield from prompt_warnings(self.prompt)

    def _edit(self, recipe: Recipe, width: int, height: int) -> Edit | None:
        """Return the picture to start from, in the size to make, in pixels; None starts from noise."""
        return None

    def _references(self, recipe: Recipe) -> tuple[GivenPicture, ...]:
        """Return the pictures that the model reads beside the prompt."""
        return ()

    def _guidance(self, recipe: Recipe) -> float | None:
        """Return the guidance scale. 0 and 1 both mean none, which a model without an input for it always does."""
        return None if recipe.guidance_scale is None and self.guidance_scale in (0.0, 1.0) else self.guidance_scale

    def _pictures(
        self, recipe: Recipe, default_seed: int | None, frames: int | None, fps: int | None
    ) -> tuple[SamplingParams, ...]:
        width, height = self._size(recipe)
        seed = default_seed if self.seed is None else self.seed
        if seed is None:
            seed = secrets.randbelow(MAX_SEED + 1)
        steps = recipe.default_steps if self.num_inference_steps is None else self.num_inference_steps
        if steps == "auto":
            steps = recipe.step_counts[-1]
        first = SamplingParams(
            self.prompt,
            seed,
            steps,
            width,
            height,
            self.decoder,
            guidance_scale=self._guidance(recipe),
            lora_scale=self.lora_scale,
            frames=frames,
            fps=fps,
            edit=self._edit(recipe, width, height),
            prompt_syntax=self.prompt_syntax,
            references=self._references(recipe),
        )
        first.check_against(recipe)
        return tuple(replace(first, seed=(seed + n) % (MAX_SEED + 1)) for n in range(self.n))

    def _delivery(self, recipe: Recipe) -> DeliveryOptions:
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
        return DeliveryOptions(
            latency_budget_ms=self.latency_budget_ms,
            min_inference_steps=(self.min_inference_steps or recipe.step_counts[0]) if is_auto else None,
            strict=self.strict,
            is_streamed=bool(self.stream),
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


RecipeOf = Callable[[str | None], Recipe]
"""Returns the recipe of a model by its name; None is the default model. Raises APIError 404 for an unknown name."""


def order_from_body(
    body: bytes, recipe_of: RecipeOf, file_formats: Sequence[ImageFormat] = (), default_seed: int | None = None
) -> ImageOrder:
    """Read the JSON body of POST /v1/images/generations.

    Args:
        file_formats: formats of the file that is the whole answer, the best first. None of them answers in JSON.
        default_seed: seed of a request that has none. None draws one.

    Raises:
        InvalidRequestError, APIError: the request cannot be served as it is.
    """
    request = with_lora(parse_body(body, ImageRequest), recipe_of)
    if file_formats:
        request = request.as_file(file_formats)
    return request.to_order(recipe_of(request.model), default_seed)


def order_from_fields(
    fields: dict[str, Any], recipe_of: RecipeOf, default_seed: int | None = None, is_text: bool = False
) -> ImageOrder:
    """Read decoded fields, named as in the JSON body.

    Args:
        default_seed: seed of a request that has none. None draws one.
        is_text: see `validate`.

    Raises:
        InvalidRequestError, APIError: the request cannot be served as it is.
    """
    request = with_lora(validate(fields, ImageRequest, is_text), recipe_of)
    return request.to_order(recipe_of(request.model), default_seed)
