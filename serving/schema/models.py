"""Answer of GET /v1/models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel

from tdm_runtime.checkpoint.frame_rule import FrameRule
from tdm_runtime.checkpoint.size_rule import SizeRule


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """One served model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "tdm"
    family: str
    """Architecture, such as "sdxl"."""
    recipe: str
    """Where the sampling recipe comes from: a file of the checkpoint, or the scheduler that implies it."""
    sizes: list[str]
    """Sizes that the model was trained at, "WxH"; the first is the default."""
    size_rule: SizeRule | None = None
    """Further sizes that it makes; None for no others."""
    frames: FrameRule | None = None
    """Numbers of frames of its clips; None for a model that makes pictures."""
    fps: int | None = None
    """Frames a second of its clips; None for a model that makes pictures."""
    step_counts: list[int]
    default_steps: int
    decoders: list[str]
    guidance_scale: float | None = None
    """Default of a request's guidance_scale; None where guidance is distilled into the weights."""
    lora_scale: float | None = None
    """Default of a request's lora_scale; None for a model that is no LoRA on a base."""
    max_references: int = 0
    """Most reference pictures of an edit; 0 for a model that reads none."""
    backend: str
    """Backend and precision that run the model, such as "openvino bf16"."""
    parity_psnr_db: dict[int, float]
    """Step count -> PSNR of the backend's pictures against torch float32, measured on a CPU like this one."""
    digest: str
    base: str | None = None
    """Name of the model that a LoRA changes; None for a checkpoint."""


class ModelList(BaseModel):
    """Answer of GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
