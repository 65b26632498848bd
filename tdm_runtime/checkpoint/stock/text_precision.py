"""Precision and device of the text encoders of stock pipelines, and the pool in which models share them."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import nn

from tdm_runtime.errors import BackendError

TextPrecision = Literal["fp32", "bf16", "int8", "fp8"]
TEXT_PRECISIONS: tuple[TextPrecision, ...] = get_args(TextPrecision)
UNCAST = ("norm", "embed", "shared", "lm_head", r"\.wo$")
"""Layers, as patterns of their names, that stay bfloat16 at fp8: those whose dtype transformers reads to cast other
tensors to it, and the output layer that Qwen3 shares with its embeddings."""

Kept = TypeVar("Kept")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextConfig:
    """How the text encoders of a stock pipeline run."""

    precision: TextPrecision = "fp32"
    """fp32 keeps the pictures of the stock pipeline. bf16 holds half the bytes; int8 and fp8 about a quarter, with
    arithmetic in int8 and in bf16."""
    device: str | None = None
    """torch device. None: that of the denoiser."""

    def on(self, device: torch.device) -> torch.device:
        """Return the device of the text encoders.

        Args:
            device: of the denoiser.

        Raises:
            BackendError: it does not exist here, or does not run the precision.
        """
        chosen = device if self.device is None else torch.device(self.device)
        if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
            raise BackendError(
                f"--text-encoder-device is {chosen} and this machine has {torch.cuda.device_count()} CUDA devices; "
                "choose one of them, or cpu"
            )
        if self.precision == "int8" and chosen.type != "cpu":
            raise BackendError(
                f"text encoders at int8 run on the CPU only, not on {chosen}; choose bf16 or fp8, or "
                "--text-encoder-device cpu"
            )
        return chosen


@torch.no_grad()
def lower_precision(module: nn.Module, precision: TextPrecision) -> nn.Module:
    """Convert a text encoder, layer by layer, so that no second copy of its weights is in memory.

    int8 is torch's dynamic quantization of the linear layers, with a scale for each row of their weights. fp8 is
    diffusers' layerwise casting: weights are stored in float8_e4m3fn and cast to bfloat16 when their layer runs.

    Args:
        module: in bfloat16 or float32; changed in place.
    """
    match precision:
        case "fp32":
            return module.float()
        case "bf16":
            return module.bfloat16()
        case "fp8":
            from diffusers.hooks import apply_layerwise_casting

            module.bfloat16()
            apply_layerwise_casting(module, torch.float8_e4m3fn, torch.bfloat16, skip_modules_pattern=UNCAST)
            return module
    _quantize_layers(module)
    return module.float()


def _quantize_layers(module: nn.Module) -> None:
    """Replace the linear layers below a module by dynamically quantized ones, one after the other."""
    from torch.ao.nn.quantized.dynamic import Linear
    from torch.ao.quantization import per_channel_dynamic_qconfig

    for name, layer in module.named_children():
        if type(layer) is not nn.Linear:
            _quantize_layers(layer)
        elif name != "lm_head":
            layer.float().qconfig = per_channel_dynamic_qconfig  # type: ignore[assignment]
            with warnings.catch_warnings():  # torch announces that torchao will replace it
                warnings.simplefilter("ignore")
                setattr(module, name, Linear.from_float(layer))  # type: ignore[no-untyped-call]


class TextPool:
    """Text encoders of the models of one engine. What has the same content, precision and device is there once.

    Not thread-safe: models are loaded one after the other, and one thread runs them.
    """

    def __init__(self) -> None:
        self._kept: dict[object, tuple[Any, set[Path]]] = {}

    def shared(self, key: object, user: Path, make: Callable[[], Kept], what: str = "") -> Kept:
        """Return what is kept under a key; make it if there is nothing.

        Args:
            user: folder of the model, for the log.
            what: text encoder, named in the log. Without it nothing is logged.
        """
        if key not in self._kept:
            self._kept[key] = make(), {user}
        kept, users = self._kept[key]
        if what and user not in users:
            gigabytes = 1e-9 * (_num_bytes(kept) if isinstance(kept, nn.Module) else 0)
            logger.info("%s shares its %s with %s, which saves %.2f GB", user, what, min(users), gigabytes)
            users.add(user)
        found: Kept = kept
        return found


def _num_bytes(module: nn.Module) -> int:
    """Return the bytes of a module's tensors, each once. Quantized layers hold theirs in tuples of weight and bias."""
    values = module.state_dict().values()
    tensors = [tensor for value in values for tensor in (value if isinstance(value, tuple) else (value,))]
    kept = {tensor.data_ptr(): tensor for tensor in tensors if isinstance(tensor, torch.Tensor)}
    return sum(tensor.numel() * tensor.element_size() for tensor in kept.values())
