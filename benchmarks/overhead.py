"""Measure the engine's own cost: the time of a picture minus the time of its model calls.

python -m benchmarks.overhead --backend openvino --threads 2
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import secrets
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.workload import Workload
from tdm_runtime.backends import Backend
from tdm_runtime.checkpoint.folder import DEFAULT_CHECKPOINT
from tdm_runtime.cli import add_backend_arguments, backend_config
from tdm_runtime.engine.engine import DiffusionEngine
from tdm_runtime.errors import TDMError
from tdm_runtime.media.image_file import encode_image
from tdm_runtime.model.choice import load_model
from tdm_runtime.model.loaded_model import LoadedModel
from tdm_runtime.model.text_encoder import ClipEncoder
from tdm_runtime.params import SamplingParams

WARM_UPS = 5
REPEATS = 1000


@dataclass
class Calls:
    """Model calls of all threads, in order: (component, start, end), in seconds of `time.perf_counter`."""

    spans: list[tuple[str, float, float]] = field(default_factory=list)


class TimedBackend:
    """Backend that records the time of every call."""

    def __init__(self, name: str, backend: Backend, calls: Calls) -> None:
        self.device: torch.device = backend.device
        self.is_batch_invariant: bool = backend.is_batch_invariant
        self._name = name
        self._backend = backend
        self._calls = calls

    def __call__(self, *inputs: Tensor) -> Tensor:
        started_s = time.perf_counter()
        output = self._backend(*inputs)
        self._calls.spans.append((self._name, started_s, time.perf_counter()))
        return output


def timed(model: LoadedModel, calls: Calls) -> LoadedModel:
    """Return the model with the calls of every component timed. Tokenizing and tiling count as the engine's work."""
    text_encoder = copy.copy(model.text_encoder)
    if isinstance(text_encoder.encoder, ClipEncoder):
        text_encoder.encoder = copy.copy(text_encoder.encoder)
        text_encoder.encoder.backend = TimedBackend("text encoder", text_encoder.encoder.backend, calls)
    decoder = copy.copy(model.decoders["full"])
    decoder.backend = TimedBackend("decoder", decoder.backend, calls)
    denoiser = TimedBackend("denoiser", model.denoiser, calls)
    return replace(model, text_encoder=text_encoder, denoiser=denoiser, decoders={"full": decoder})


def overhead(model: LoadedModel, pictures: int, steps: int, seed: int = 0) -> dict[str, Any]:
    """Make one picture at a time in the engine. Values are medians in milliseconds, or shares."""
    calls, width_height = Calls(), model.recipe.native_sizes[0]
    walls: list[float] = []
    parts: dict[str, list[float]] = {}
    requests = itertools.islice(Workload(seed, tag=secrets.token_hex(2)).requests(), WARM_UPS + pictures)
    with DiffusionEngine(timed(model, calls)) as engine:
        for number, request in enumerate(requests):
            params = SamplingParams(request.prompt, request.seed, steps, *width_height)
            calls.spans.clear()
            submitted_s = time.perf_counter()
            picture = engine.submit(params).result()
            ended_s = time.perf_counter()
            if number >= WARM_UPS:
                walls.append(1e3 * (ended_s - submitted_s))
                for part, ms in _split(submitted_s, list(calls.spans), ended_s).items():
                    parts.setdefault(part, []).append(ms)
    medians = {part: statistics.median(values) for part, values in parts.items()}
    pixels, prompt = picture.pixels, request.prompt
    encode_ms = _median_ms(lambda: encode_image(pixels, "png"), REPEATS // 10)
    engine_ms = [wall - inside for wall, inside in zip(walls, parts["model calls"], strict=True)]
    return {
        "steps": steps,
        "pictures": pictures,
        "wall_ms": statistics.median(walls),
        "parts_ms": medians,
        "engine_ms": statistics.median(engine_ms),
        "engine_share": statistics.median(ms / wall for ms, wall in zip(engine_ms, walls, strict=True)),
        "text_cache_hit_ms": _median_ms(lambda: engine.model.text_encoder.encode(prompt), REPEATS),
        "png_ms": encode_ms,
        "png_share": encode_ms / (encode_ms + statistics.median(walls)),
    }


def _split(submitted_s: float, spans: list[tuple[str, float, float]], ended_s: float) -> dict[str, float]:
    """Return the time of the model calls and of the gaps between them, in milliseconds."""
    names = [name for name, _, _ in spans]
    first, last = names.index("denoiser"), len(names) - 1 - names[::-1].index("denoiser")
    between = [1e3 * (spans[n + 1][1] - spans[n][2]) for n in range(first, last)]
    return {
        "model calls": 1e3 * sum(end_s - start_s for _, start_s, end_s in spans),
        "submission to text encoder": 1e3 * (spans[0][1] - submitted_s),
        "text encoder to first step": 1e3 * (spans[first][1] - spans[0][2]),
        "between two steps": statistics.fmean(between) if between else 0.0,
        "last step to decoder": 1e3 * (spans[last + 1][1] - spans[last][2]),
        "decoder to caller": 1e3 * (ended_s - spans[-1][2]),
    }


def _median_ms(call: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        started_s = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - started_s))
    return statistics.median(times)


def main(arguments: list[str] | None = None) -> int:
    """Run the command. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="benchmarks.overhead", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT, help="checkpoint folder (%(default)s)")
    parser.add_argument("--pictures", type=int, default=200, help="pictures, one at a time (%(default)s)")
    parser.add_argument("--steps", type=int, default=4, help="num_inference_steps of each (%(default)s)")
    add_backend_arguments(parser)
    given = parser.parse_args(arguments)
    try:
        model = load_model(given.checkpoint, backend_config(given))
        print(json.dumps({"backend": model.backend} | overhead(model, given.pictures, given.steps), indent=2))
    except (TDMError, ValueError, OSError) as error:
        print(f"benchmarks.overhead: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
