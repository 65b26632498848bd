"""`NAME.json`, which may lie beside `NAME.safetensors` in the folder of LoRAs."""

from __future__ import annotations

from dataclasses import dataclass

import pydantic


@dataclass(frozen=True)
class LoraSettings:
    """How a LoRA of the folder is served."""

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid")

    scale: float = 1.0
    """Multiplies what the LoRA adds to its base."""
    base: str | None = None
    """Name of the model that it changes; None is the first model."""


_ADAPTER = pydantic.TypeAdapter(LoraSettings)


def read_lora_settings(content: bytes) -> LoraSettings:
    """Read the content of `NAME.json`.

    Raises:
        ValueError: the content is not JSON, or has an unknown field or a wrong value.
    """
    return _ADAPTER.validate_json(content)
