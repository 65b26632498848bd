"""The wire's shapes. The only place that parses what a client sends."""

from __future__ import annotations

import json
import re
import secrets
from dataclasses import replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from serving.errors import APIError, invalid
from tdm_runtime.codec import ImageFormat
from tdm_runtime.errors import shown
from tdm_runtime.params import MAX_PROMPT_CHARACTERS, MAX_SEED, DecoderName, SamplingParams
from tdm_runtime.recipe import Recipe

MAX_PICTURES = 10
MAX_JSON_DEPTH = 16
SIZE_PATTERN = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", re.ASCII)


class ImageRequest(BaseModel):
    """Body of POST /v1/images/generations. Names follow OpenAI; sampling fields follow diffusers."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str = Field(description=f"What the picture shows, 1..{MAX_PROMPT_CHARACTERS} characters.")
    model: str | None = Field(None, description="Model id from /v1/models; the served model by default.")
    n: int = Field(1, ge=1, le=MAX_PICTURES, description="Pictures; the i-th uses seed + i.")
    size: str = Field("auto", description='"WxH" from the model\'s sizes, or "auto".')
    seed: int | None = Field(None, description=f"0..{MAX_SEED}; drawn by the server when absent.")
    num_inference_steps: int | None = Field(None, description="One of the model's step counts.")
    decoder: DecoderName = Field("full", description="tiny decodes several times faster and a little softer.")
    guidance_scale: float | None = Field(None, description="Only 1: guidance is distilled into the weights.")
    negative_prompt: str | None = Field(None, description="Only empty: it needs guidance.")
    response_format: Literal["b64_json"] = "b64_json"
    output_format: ImageFormat = "png"
    output_compression: int = Field(100, ge=0, le=100, description="Quality of jpeg and webp.")
    metadata: bool = Field(True, description="Write prompt, seed and steps into the picture file.")
    user: str | None = Field(None, max_length=256, description="Accepted and unused.")
    stream: Literal[False] | None = Field(None, description="Streaming is not served yet.")
    quality: Literal["auto", "standard"] | None = Field(None, description="Only auto: steps are the quality dial.")
    background: Literal["auto", "opaque"] | None = Field(None, description="Pictures are opaque.")

    def to_sampling_params(self, recipe: Recipe) -> list[SamplingParams]:
        """One `SamplingParams` a picture.

        Raises:
            InvalidRequestError, APIError: a value outside its limits.
        """
        if self.model is not None and self.model != recipe.name:
            message = f"model {self.model[:64]!r} does not exist; this server has {recipe.name!r}"
            raise invalid(message, "model", "model_not_found", status=404)
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
        params = SamplingParams(self.prompt, first_seed, steps, width, height, self.decoder)
        params.check_against(recipe)
        seeds = ((first_seed + n) % (MAX_SEED + 1) for n in range(self.n))
        return [replace(params, seed=seed) for seed in seeds]

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


def parse_image_request(body: bytes) -> ImageRequest:
    """Read a request body strictly.

    Raises:
        APIError: 400 naming the field, its value and the limit.
    """
    raw = parse_json(body)
    if not isinstance(raw, dict):
        raise invalid(f"the body is a JSON {type(raw).__name__}; send an object", None, "invalid_json")
    try:
        return ImageRequest.model_validate(raw)
    except ValidationError as error:
        raise _from_validation(error) from None


def parse_json(body: bytes) -> Any:
    """Decode JSON, refusing what parsers disagree on: duplicate keys, NaN, deep nesting, invalid UTF-8."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise invalid(f"the key {key[:64]!r} appears twice; send it once", key[:64], "invalid_json")
            found[key] = value
        return found

    def refuse_constant(name: str) -> None:
        raise invalid(f"{name} is not JSON; send a finite number", None, "invalid_json")

    try:
        text = body.decode("utf-8")
        if _depth_exceeds(text, MAX_JSON_DEPTH):
            raise invalid(
                f"the body nests deeper than {MAX_JSON_DEPTH} levels; this API needs one", None, "invalid_json"
            )
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse_constant)
    except UnicodeDecodeError as error:
        raise invalid(f"the body is not UTF-8 (byte {error.start}); encode it as UTF-8", None, "invalid_json") from None
    except (json.JSONDecodeError, RecursionError, ValueError) as error:
        raise invalid(f"the body is not JSON: {str(error)[:120]}", None, "invalid_json") from None


def _depth_exceeds(text: str, limit: int) -> bool:
    """Whether brackets outside strings nest deeper than `limit`."""
    depth = 0
    for token in re.finditer(r'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]', text, re.DOTALL):
        if token[0] in "[{":
            depth += 1
            if depth > limit:
                return True
        elif token[0] in "]}":
            depth -= 1
    return False


def _from_validation(error: ValidationError) -> APIError:
    """The first thing pydantic found, with the field as `param`."""
    first = error.errors(include_url=False)[0]
    param = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        return invalid(f"{param} is required", param, "missing_required_parameter")
    if first["type"] == "extra_forbidden":
        known = ", ".join(ImageRequest.model_fields)
        return invalid(f"{param[:64]!r} is not a parameter; known are {known}", param[:64], "unknown_parameter")
    reason = first["msg"][:1].lower() + first["msg"][1:]
    return invalid(f"{param} is {shown(first['input'])}; {reason}", param, "invalid_value")


class GeneratedImage(BaseModel):
    """One picture."""

    b64_json: str
    seed: int
    num_inference_steps: int


class InputTokenDetails(BaseModel):
    """Prompt tokens by kind."""

    text_tokens: int
    image_tokens: int = 0


class Usage(BaseModel):
    """Prompt tokens read, and latent positions made."""

    input_tokens: int
    input_tokens_details: InputTokenDetails
    output_tokens: int
    total_tokens: int


class ImageTimings(BaseModel):
    """Where the time of the slowest picture went, in milliseconds."""

    queue_ms: float
    text_ms: float
    steps_ms: list[float]
    decode_ms: float
    encode_ms: float
    total_ms: float


class ImageResponse(BaseModel):
    """Answer of POST /v1/images/generations."""

    created: int
    data: list[GeneratedImage]
    model: str
    output_format: ImageFormat
    size: str
    usage: Usage
    timings: ImageTimings
    warnings: list[str] = []


class ModelCard(BaseModel):
    """One served model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "tdm"
    sizes: list[str]
    step_counts: list[int]
    default_steps: int
    decoders: list[str]
    backend: str
    """What runs it, as "openvino bf16"."""
    parity_psnr_db: dict[int, float]
    """Step count -> how close its pictures come to torch float32, as `tdm-export` measured."""
    digest: str


class ModelList(BaseModel):
    """Answer of GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
