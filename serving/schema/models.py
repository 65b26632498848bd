"""Answer of GET /v1/models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel


@dataclass(frozen=True, kw_only=True)
class ModelCard:
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
