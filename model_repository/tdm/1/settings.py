"""The parameters of config.pbtxt, with the defaults and the checks of `tdm-generate`'s arguments."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from tdm_runtime import DiffusionEngine, EngineConfig, load_model
from tdm_runtime.checkpoint.folder import DEFAULT_CHECKPOINT
from tdm_runtime.cli import add_backend_arguments, add_lora_argument, backend_config
from tdm_runtime.engine.warm_up import warm_up
from tdm_runtime.safety import Safety

LISTS = ("lora",)
"""Parameters with several values, separated by spaces and quoted as in a shell."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"config.pbtxt: {message.replace('--', 'parameter ')}")


def read_settings(parameters: Mapping[str, Mapping[str, str]]) -> argparse.Namespace:
    """Read the parameters of a Triton model configuration.

    Args:
        parameters: name -> {"string_value": value}, as Triton passes them. An empty value takes the default, and
            $NAME is replaced by an environment variable, or by nothing where there is none.

    Raises:
        ValueError: a parameter is unknown or has a wrong value.
    """
    parser = _Parser(prog="config.pbtxt", allow_abbrev=False, add_help=False)
    parser.add_argument("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT)
    parser.add_argument("--device")
    parser.add_argument("--max_live", type=int, default=EngineConfig.max_live)
    parser.add_argument("--blocked_words", type=Path)
    parser.add_argument("--safety_checker")
    add_lora_argument(parser)
    add_backend_arguments(parser)
    arguments: list[str] = []
    for name, value in parameters.items():
        text = os.path.expandvars(value["string_value"])
        text = "" if text.startswith("$") else text
        for part in shlex.split(text) if name in LISTS else filter(None, [text]):
            arguments.append(f"--{name}={part}")
    return parser.parse_args(arguments)


def start_engine(settings: argparse.Namespace, gpu: int | None) -> DiffusionEngine:
    """Load the model, start its engine and warm it up.

    Args:
        gpu: number of the instance's GPU; None on a CPU. The parameter `device` replaces it.

    Raises:
        TDMError, ValueError: the model cannot be served as configured; the message says why.
    """
    device = settings.device or (None if gpu is None else f"cuda:{gpu}")
    model = load_model(settings.checkpoint, backend_config(settings), device, settings.lora)
    engine = DiffusionEngine(model, EngineConfig(max_live=settings.max_live))
    engine.start()
    warm_up(engine)
    return engine


def load_safety(settings: argparse.Namespace) -> Safety:
    """Create the checkers of prompts and pictures.

    Raises:
        ValueError: a checker cannot be created.
    """
    return Safety.load(settings.blocked_words, settings.safety_checker)


def instance_gpu(arguments: Mapping[str, Any]) -> int | None:
    """Return the GPU of an instance from what Triton passes to `initialize`; None on a CPU."""
    return int(arguments["model_instance_device_id"]) if arguments["model_instance_kind"] == "GPU" else None
