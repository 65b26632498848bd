"""Few-step diffusion: a checkpoint folder in, pictures or clips out.

    from tdm_runtime import SamplingParams, generate, load_model

    model = load_model()  # the embedded checkpoint
    pixels = generate(model, SamplingParams("a red heart", seed=7, num_inference_steps=4, width=64, height=64))

`DiffusionEngine` runs many requests at once and returns futures. Everything here is imported when it is first used:
the scheduler and the errors load without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tdm_runtime.errors import (
    ArtifactError,
    BackendError,
    CancelledError,
    CheckpointError,
    DeadlineError,
    GenerationError,
    InvalidRequestError,
    NotFiniteError,
    OverloadedError,
    RecipeError,
    TDMError,
)

if TYPE_CHECKING:
    from tdm_runtime.engine.delivery import Delivery, Preview
    from tdm_runtime.engine.engine import DiffusionEngine, EngineConfig
    from tdm_runtime.engine.sample import Picture
    from tdm_runtime.model.artifacts import BackendConfig
    from tdm_runtime.model.choice import load_model
    from tdm_runtime.model.loaded_model import LoadedModel
    from tdm_runtime.params import SamplingParams
    from tdm_runtime.pipeline import generate

__all__ = [
    "ArtifactError",
    "BackendConfig",
    "BackendError",
    "CancelledError",
    "CheckpointError",
    "DeadlineError",
    "Delivery",
    "DiffusionEngine",
    "EngineConfig",
    "GenerationError",
    "InvalidRequestError",
    "LoadedModel",
    "NotFiniteError",
    "OverloadedError",
    "Picture",
    "Preview",
    "RecipeError",
    "SamplingParams",
    "TDMError",
    "generate",
    "load_model",
]

_LAZY = {
    "BackendConfig": "model.artifacts",
    "Delivery": "engine.delivery",
    "DiffusionEngine": "engine.engine",
    "EngineConfig": "engine.engine",
    "LoadedModel": "model.loaded_model",
    "Picture": "engine.sample",
    "Preview": "engine.delivery",
    "SamplingParams": "params",
    "generate": "pipeline",
    "load_model": "model.choice",
}
"""Name -> the module that has it, below this package."""


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
