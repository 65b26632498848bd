from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Decoder(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DECODER_UNSPECIFIED: _ClassVar[Decoder]
    DECODER_FULL: _ClassVar[Decoder]
    DECODER_TINY: _ClassVar[Decoder]

class OutputFormat(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OUTPUT_FORMAT_UNSPECIFIED: _ClassVar[OutputFormat]
    OUTPUT_FORMAT_PNG: _ClassVar[OutputFormat]
    OUTPUT_FORMAT_WEBP: _ClassVar[OutputFormat]
    OUTPUT_FORMAT_JPEG: _ClassVar[OutputFormat]
    OUTPUT_FORMAT_PIXELS: _ClassVar[OutputFormat]
    OUTPUT_FORMAT_MP4: _ClassVar[OutputFormat]
    OUTPUT_FORMAT_WEBM: _ClassVar[OutputFormat]
    OUTPUT_FORMAT_GIF: _ClassVar[OutputFormat]
DECODER_UNSPECIFIED: Decoder
DECODER_FULL: Decoder
DECODER_TINY: Decoder
OUTPUT_FORMAT_UNSPECIFIED: OutputFormat
OUTPUT_FORMAT_PNG: OutputFormat
OUTPUT_FORMAT_WEBP: OutputFormat
OUTPUT_FORMAT_JPEG: OutputFormat
OUTPUT_FORMAT_PIXELS: OutputFormat
OUTPUT_FORMAT_MP4: OutputFormat
OUTPUT_FORMAT_WEBM: OutputFormat
OUTPUT_FORMAT_GIF: OutputFormat

class GenerateRequest(_message.Message):
    __slots__ = ("prompt", "model", "n", "size", "seed", "num_inference_steps", "auto_steps", "latency_budget_ms", "strict", "decoder", "guidance_scale", "negative_prompt", "output_format", "output_compression", "metadata", "lora_scale", "image", "mask", "strength", "prompt_syntax")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    N_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    NUM_INFERENCE_STEPS_FIELD_NUMBER: _ClassVar[int]
    AUTO_STEPS_FIELD_NUMBER: _ClassVar[int]
    LATENCY_BUDGET_MS_FIELD_NUMBER: _ClassVar[int]
    STRICT_FIELD_NUMBER: _ClassVar[int]
    DECODER_FIELD_NUMBER: _ClassVar[int]
    GUIDANCE_SCALE_FIELD_NUMBER: _ClassVar[int]
    NEGATIVE_PROMPT_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FORMAT_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_COMPRESSION_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    LORA_SCALE_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    MASK_FIELD_NUMBER: _ClassVar[int]
    STRENGTH_FIELD_NUMBER: _ClassVar[int]
    PROMPT_SYNTAX_FIELD_NUMBER: _ClassVar[int]
    prompt: str
    model: str
    n: int
    size: Size
    seed: int
    num_inference_steps: int
    auto_steps: AutoSteps
    latency_budget_ms: float
    strict: bool
    decoder: Decoder
    guidance_scale: float
    negative_prompt: str
    output_format: OutputFormat
    output_compression: int
    metadata: bool
    lora_scale: float
    image: _containers.RepeatedScalarFieldContainer[bytes]
    mask: bytes
    strength: float
    prompt_syntax: str
    def __init__(self, prompt: _Optional[str] = ..., model: _Optional[str] = ..., n: _Optional[int] = ..., size: _Optional[_Union[Size, _Mapping]] = ..., seed: _Optional[int] = ..., num_inference_steps: _Optional[int] = ..., auto_steps: _Optional[_Union[AutoSteps, _Mapping]] = ..., latency_budget_ms: _Optional[float] = ..., strict: _Optional[bool] = ..., decoder: _Optional[_Union[Decoder, str]] = ..., guidance_scale: _Optional[float] = ..., negative_prompt: _Optional[str] = ..., output_format: _Optional[_Union[OutputFormat, str]] = ..., output_compression: _Optional[int] = ..., metadata: _Optional[bool] = ..., lora_scale: _Optional[float] = ..., image: _Optional[_Iterable[bytes]] = ..., mask: _Optional[bytes] = ..., strength: _Optional[float] = ..., prompt_syntax: _Optional[str] = ...) -> None: ...

class GenerateStreamRequest(_message.Message):
    __slots__ = ("picture", "partial_images", "draft")
    PICTURE_FIELD_NUMBER: _ClassVar[int]
    PARTIAL_IMAGES_FIELD_NUMBER: _ClassVar[int]
    DRAFT_FIELD_NUMBER: _ClassVar[int]
    picture: GenerateRequest
    partial_images: int
    draft: bool
    def __init__(self, picture: _Optional[_Union[GenerateRequest, _Mapping]] = ..., partial_images: _Optional[int] = ..., draft: _Optional[bool] = ...) -> None: ...

class GenerateVideoRequest(_message.Message):
    __slots__ = ("prompt", "model", "size", "num_frames", "seconds", "fps", "seed", "num_inference_steps", "auto_steps", "latency_budget_ms", "strict", "decoder", "guidance_scale", "lora_scale", "output_format", "prompt_syntax")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_FRAMES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    FPS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    NUM_INFERENCE_STEPS_FIELD_NUMBER: _ClassVar[int]
    AUTO_STEPS_FIELD_NUMBER: _ClassVar[int]
    LATENCY_BUDGET_MS_FIELD_NUMBER: _ClassVar[int]
    STRICT_FIELD_NUMBER: _ClassVar[int]
    DECODER_FIELD_NUMBER: _ClassVar[int]
    GUIDANCE_SCALE_FIELD_NUMBER: _ClassVar[int]
    LORA_SCALE_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FORMAT_FIELD_NUMBER: _ClassVar[int]
    PROMPT_SYNTAX_FIELD_NUMBER: _ClassVar[int]
    prompt: str
    model: str
    size: Size
    num_frames: int
    seconds: int
    fps: int
    seed: int
    num_inference_steps: int
    auto_steps: AutoSteps
    latency_budget_ms: float
    strict: bool
    decoder: Decoder
    guidance_scale: float
    lora_scale: float
    output_format: OutputFormat
    prompt_syntax: str
    def __init__(self, prompt: _Optional[str] = ..., model: _Optional[str] = ..., size: _Optional[_Union[Size, _Mapping]] = ..., num_frames: _Optional[int] = ..., seconds: _Optional[int] = ..., fps: _Optional[int] = ..., seed: _Optional[int] = ..., num_inference_steps: _Optional[int] = ..., auto_steps: _Optional[_Union[AutoSteps, _Mapping]] = ..., latency_budget_ms: _Optional[float] = ..., strict: _Optional[bool] = ..., decoder: _Optional[_Union[Decoder, str]] = ..., guidance_scale: _Optional[float] = ..., lora_scale: _Optional[float] = ..., output_format: _Optional[_Union[OutputFormat, str]] = ..., prompt_syntax: _Optional[str] = ...) -> None: ...

class GenerateVideoStreamRequest(_message.Message):
    __slots__ = ("video", "partial_images")
    VIDEO_FIELD_NUMBER: _ClassVar[int]
    PARTIAL_IMAGES_FIELD_NUMBER: _ClassVar[int]
    video: GenerateVideoRequest
    partial_images: int
    def __init__(self, video: _Optional[_Union[GenerateVideoRequest, _Mapping]] = ..., partial_images: _Optional[int] = ...) -> None: ...

class AutoSteps(_message.Message):
    __slots__ = ("min_inference_steps",)
    MIN_INFERENCE_STEPS_FIELD_NUMBER: _ClassVar[int]
    min_inference_steps: int
    def __init__(self, min_inference_steps: _Optional[int] = ...) -> None: ...

class Size(_message.Message):
    __slots__ = ("width", "height")
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    width: int
    height: int
    def __init__(self, width: _Optional[int] = ..., height: _Optional[int] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("created", "model", "images", "output_format", "size", "usage", "timings", "predicted_ms", "latency_budget_kept", "warnings")
    CREATED_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FORMAT_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_MS_FIELD_NUMBER: _ClassVar[int]
    LATENCY_BUDGET_KEPT_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    created: int
    model: str
    images: _containers.RepeatedCompositeFieldContainer[Image]
    output_format: OutputFormat
    size: Size
    usage: Usage
    timings: Timings
    predicted_ms: float
    latency_budget_kept: bool
    warnings: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, created: _Optional[int] = ..., model: _Optional[str] = ..., images: _Optional[_Iterable[_Union[Image, _Mapping]]] = ..., output_format: _Optional[_Union[OutputFormat, str]] = ..., size: _Optional[_Union[Size, _Mapping]] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ..., predicted_ms: _Optional[float] = ..., latency_budget_kept: _Optional[bool] = ..., warnings: _Optional[_Iterable[str]] = ...) -> None: ...

class Image(_message.Message):
    __slots__ = ("content", "seed", "num_inference_steps", "is_cached", "receipt", "num_steps_taken")
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    NUM_INFERENCE_STEPS_FIELD_NUMBER: _ClassVar[int]
    IS_CACHED_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    NUM_STEPS_TAKEN_FIELD_NUMBER: _ClassVar[int]
    content: bytes
    seed: int
    num_inference_steps: int
    is_cached: bool
    receipt: Receipt
    num_steps_taken: int
    def __init__(self, content: _Optional[bytes] = ..., seed: _Optional[int] = ..., num_inference_steps: _Optional[int] = ..., is_cached: _Optional[bool] = ..., receipt: _Optional[_Union[Receipt, _Mapping]] = ..., num_steps_taken: _Optional[int] = ...) -> None: ...

class GenerateVideoResponse(_message.Message):
    __slots__ = ("created", "model", "video", "output_format", "size", "num_frames", "usage", "timings", "predicted_ms", "latency_budget_kept", "warnings")
    CREATED_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VIDEO_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FORMAT_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_FRAMES_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_MS_FIELD_NUMBER: _ClassVar[int]
    LATENCY_BUDGET_KEPT_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    created: int
    model: str
    video: Image
    output_format: OutputFormat
    size: Size
    num_frames: int
    usage: Usage
    timings: Timings
    predicted_ms: float
    latency_budget_kept: bool
    warnings: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, created: _Optional[int] = ..., model: _Optional[str] = ..., video: _Optional[_Union[Image, _Mapping]] = ..., output_format: _Optional[_Union[OutputFormat, str]] = ..., size: _Optional[_Union[Size, _Mapping]] = ..., num_frames: _Optional[int] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ..., predicted_ms: _Optional[float] = ..., latency_budget_kept: _Optional[bool] = ..., warnings: _Optional[_Iterable[str]] = ...) -> None: ...

class GenerateStreamResponse(_message.Message):
    __slots__ = ("partial_image", "completed")
    PARTIAL_IMAGE_FIELD_NUMBER: _ClassVar[int]
    COMPLETED_FIELD_NUMBER: _ClassVar[int]
    partial_image: PartialImage
    completed: GenerateResponse
    def __init__(self, partial_image: _Optional[_Union[PartialImage, _Mapping]] = ..., completed: _Optional[_Union[GenerateResponse, _Mapping]] = ...) -> None: ...

class GenerateVideoStreamResponse(_message.Message):
    __slots__ = ("partial_image", "completed")
    PARTIAL_IMAGE_FIELD_NUMBER: _ClassVar[int]
    COMPLETED_FIELD_NUMBER: _ClassVar[int]
    partial_image: PartialImage
    completed: GenerateVideoResponse
    def __init__(self, partial_image: _Optional[_Union[PartialImage, _Mapping]] = ..., completed: _Optional[_Union[GenerateVideoResponse, _Mapping]] = ...) -> None: ...

class PartialImage(_message.Message):
    __slots__ = ("content", "index", "created", "output_format", "size", "is_draft", "num_steps_taken")
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FORMAT_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    IS_DRAFT_FIELD_NUMBER: _ClassVar[int]
    NUM_STEPS_TAKEN_FIELD_NUMBER: _ClassVar[int]
    content: bytes
    index: int
    created: int
    output_format: OutputFormat
    size: Size
    is_draft: bool
    num_steps_taken: int
    def __init__(self, content: _Optional[bytes] = ..., index: _Optional[int] = ..., created: _Optional[int] = ..., output_format: _Optional[_Union[OutputFormat, str]] = ..., size: _Optional[_Union[Size, _Mapping]] = ..., is_draft: _Optional[bool] = ..., num_steps_taken: _Optional[int] = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("input_tokens", "output_tokens", "total_tokens")
    INPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    input_tokens: int
    output_tokens: int
    total_tokens: int
    def __init__(self, input_tokens: _Optional[int] = ..., output_tokens: _Optional[int] = ..., total_tokens: _Optional[int] = ...) -> None: ...

class Timings(_message.Message):
    __slots__ = ("queue_ms", "text_ms", "steps_ms", "decode_ms", "encode_ms", "total_ms", "image_ms")
    QUEUE_MS_FIELD_NUMBER: _ClassVar[int]
    TEXT_MS_FIELD_NUMBER: _ClassVar[int]
    STEPS_MS_FIELD_NUMBER: _ClassVar[int]
    DECODE_MS_FIELD_NUMBER: _ClassVar[int]
    ENCODE_MS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_MS_FIELD_NUMBER: _ClassVar[int]
    IMAGE_MS_FIELD_NUMBER: _ClassVar[int]
    queue_ms: float
    text_ms: float
    steps_ms: _containers.RepeatedScalarFieldContainer[float]
    decode_ms: float
    encode_ms: float
    total_ms: float
    image_ms: float
    def __init__(self, queue_ms: _Optional[float] = ..., text_ms: _Optional[float] = ..., steps_ms: _Optional[_Iterable[float]] = ..., decode_ms: _Optional[float] = ..., encode_ms: _Optional[float] = ..., total_ms: _Optional[float] = ..., image_ms: _Optional[float] = ...) -> None: ...

class Receipt(_message.Message):
    __slots__ = ("model", "digest", "prompt", "seed", "num_inference_steps", "width", "height", "decoder", "backend", "bucket", "is_strict", "pixels_sha256", "guidance_scale", "lora_scale", "frames", "threads", "strength", "edit_sha256", "prompt_syntax", "watermark", "references")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    NUM_INFERENCE_STEPS_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    DECODER_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    BUCKET_FIELD_NUMBER: _ClassVar[int]
    IS_STRICT_FIELD_NUMBER: _ClassVar[int]
    PIXELS_SHA256_FIELD_NUMBER: _ClassVar[int]
    GUIDANCE_SCALE_FIELD_NUMBER: _ClassVar[int]
    LORA_SCALE_FIELD_NUMBER: _ClassVar[int]
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    THREADS_FIELD_NUMBER: _ClassVar[int]
    STRENGTH_FIELD_NUMBER: _ClassVar[int]
    EDIT_SHA256_FIELD_NUMBER: _ClassVar[int]
    PROMPT_SYNTAX_FIELD_NUMBER: _ClassVar[int]
    WATERMARK_FIELD_NUMBER: _ClassVar[int]
    REFERENCES_FIELD_NUMBER: _ClassVar[int]
    model: str
    digest: str
    prompt: str
    seed: int
    num_inference_steps: int
    width: int
    height: int
    decoder: str
    backend: str
    bucket: _containers.RepeatedScalarFieldContainer[int]
    is_strict: bool
    pixels_sha256: str
    guidance_scale: float
    lora_scale: float
    frames: int
    threads: int
    strength: float
    edit_sha256: str
    prompt_syntax: str
    watermark: str
    references: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, model: _Optional[str] = ..., digest: _Optional[str] = ..., prompt: _Optional[str] = ..., seed: _Optional[int] = ..., num_inference_steps: _Optional[int] = ..., width: _Optional[int] = ..., height: _Optional[int] = ..., decoder: _Optional[str] = ..., backend: _Optional[str] = ..., bucket: _Optional[_Iterable[int]] = ..., is_strict: _Optional[bool] = ..., pixels_sha256: _Optional[str] = ..., guidance_scale: _Optional[float] = ..., lora_scale: _Optional[float] = ..., frames: _Optional[int] = ..., threads: _Optional[int] = ..., strength: _Optional[float] = ..., edit_sha256: _Optional[str] = ..., prompt_syntax: _Optional[str] = ..., watermark: _Optional[str] = ..., references: _Optional[_Iterable[str]] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[Model]
    def __init__(self, models: _Optional[_Iterable[_Union[Model, _Mapping]]] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("id", "created", "sizes", "step_counts", "default_steps", "decoders", "backend", "parity_psnr_db", "digest", "family", "recipe", "size_rule", "guidance_scale", "lora_scale", "frames", "fps", "max_references")
    class ParityPsnrDbEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: float
        def __init__(self, key: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...
    ID_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    SIZES_FIELD_NUMBER: _ClassVar[int]
    STEP_COUNTS_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_STEPS_FIELD_NUMBER: _ClassVar[int]
    DECODERS_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    PARITY_PSNR_DB_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    FAMILY_FIELD_NUMBER: _ClassVar[int]
    RECIPE_FIELD_NUMBER: _ClassVar[int]
    SIZE_RULE_FIELD_NUMBER: _ClassVar[int]
    GUIDANCE_SCALE_FIELD_NUMBER: _ClassVar[int]
    LORA_SCALE_FIELD_NUMBER: _ClassVar[int]
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    FPS_FIELD_NUMBER: _ClassVar[int]
    MAX_REFERENCES_FIELD_NUMBER: _ClassVar[int]
    id: str
    created: int
    sizes: _containers.RepeatedScalarFieldContainer[str]
    step_counts: _containers.RepeatedScalarFieldContainer[int]
    default_steps: int
    decoders: _containers.RepeatedScalarFieldContainer[str]
    backend: str
    parity_psnr_db: _containers.ScalarMap[int, float]
    digest: str
    family: str
    recipe: str
    size_rule: SizeRule
    guidance_scale: float
    lora_scale: float
    frames: FrameRule
    fps: int
    max_references: int
    def __init__(self, id: _Optional[str] = ..., created: _Optional[int] = ..., sizes: _Optional[_Iterable[str]] = ..., step_counts: _Optional[_Iterable[int]] = ..., default_steps: _Optional[int] = ..., decoders: _Optional[_Iterable[str]] = ..., backend: _Optional[str] = ..., parity_psnr_db: _Optional[_Mapping[int, float]] = ..., digest: _Optional[str] = ..., family: _Optional[str] = ..., recipe: _Optional[str] = ..., size_rule: _Optional[_Union[SizeRule, _Mapping]] = ..., guidance_scale: _Optional[float] = ..., lora_scale: _Optional[float] = ..., frames: _Optional[_Union[FrameRule, _Mapping]] = ..., fps: _Optional[int] = ..., max_references: _Optional[int] = ...) -> None: ...

class FrameRule(_message.Message):
    __slots__ = ("default", "step", "max_frames")
    DEFAULT_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    MAX_FRAMES_FIELD_NUMBER: _ClassVar[int]
    default: int
    step: int
    max_frames: int
    def __init__(self, default: _Optional[int] = ..., step: _Optional[int] = ..., max_frames: _Optional[int] = ...) -> None: ...

class SizeRule(_message.Message):
    __slots__ = ("multiple", "min_side", "max_side", "max_pixels")
    MULTIPLE_FIELD_NUMBER: _ClassVar[int]
    MIN_SIDE_FIELD_NUMBER: _ClassVar[int]
    MAX_SIDE_FIELD_NUMBER: _ClassVar[int]
    MAX_PIXELS_FIELD_NUMBER: _ClassVar[int]
    multiple: int
    min_side: int
    max_side: int
    max_pixels: int
    def __init__(self, multiple: _Optional[int] = ..., min_side: _Optional[int] = ..., max_side: _Optional[int] = ..., max_pixels: _Optional[int] = ...) -> None: ...
