"""Warm-up: runs every kind of call before the first request and measures its cost."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from tdm_runtime.engine.delivery import Delivery
from tdm_runtime.engine.engine import DiffusionEngine
from tdm_runtime.engine.intake import call_kind
from tdm_runtime.families.conditioning import Conditioning
from tdm_runtime.model.decoder import Decoder
from tdm_runtime.model.loaded_model import LoadedModel, denoise
from tdm_runtime.model.text_encoder import TextEncoder, stacked
from tdm_runtime.params import SamplingParams
from tdm_runtime.scheduling.cost_model import MIN_GAIN, Kind

PASSES = 3
"""Number of times that all sizes are measured, one after the other."""
ROUNDS = 5
"""Most calls of one size in a pass."""
PASS_S = 0.1
"""Seconds after which a pass over one size ends, even before `ROUNDS` calls."""
BOOKKEEPING_S = 3e-4
"""Approximate time that the engine adds to each call of the model, whatever its size."""
PROMPT = "warm-up"


def warm_up(engine: DiffusionEngine, model: LoadedModel | None = None) -> None:
    """Measure every kind of call of a model, then make a picture of every size, step count and decoder.

    The engine may be serving meanwhile: each call runs between two of its own.

    Args:
        model: Model to warm up; None is the engine's own.

    Raises:
        TDMError: The model cannot make a picture.
    """
    model = model or engine.model
    _learn_costs(engine, model)
    recipe = model.recipe
    for (width, height), decoder, steps in itertools.product(recipe.native_sizes, model.decoders, recipe.step_counts):
        engine.submit(SamplingParams(PROMPT, 0, steps, width, height, decoder), model=model).result()
    width, height = recipe.native_sizes[0]
    params = SamplingParams(PROMPT, 0, recipe.step_counts[-1], width, height)
    engine.submit(params, Delivery(on_preview=lambda preview: None, num_previews=1), model).result()


def _learn_costs(engine: DiffusionEngine, model: LoadedModel) -> None:
    numbers = itertools.count()
    _learn(engine, call_kind(model, "text"), partial(_encode, model.text_encoder, numbers), capacity=1)
    size = 2
    # Larger sizes run once and are not learned: forecasts do not count on the time that encoding together saves.
    while size <= engine.config.max_batch_size:
        _seconds(engine, partial(_encode, model.text_encoder, numbers), size)
        size *= 2
    for width, height in model.recipe.native_sizes:
        params = SamplingParams(PROMPT, 0, model.recipe.default_steps, width, height)
        shape = model.latent_shape(params)
        _learn(engine, call_kind(model, "denoise", shape), _denoise(engine, model, params))
        for name, decoder in model.decoders.items():
            kind = call_kind(model, f"decode:{name}", shape)
            if engine.call_seconds(kind):
                continue  # a LoRA and its base share the decoder
            latents = torch.zeros(engine.config.max_batch_size, *shape, device=model.denoiser.device)
            _learn(engine, kind, partial(_decode, decoder, latents))


def _encode(text_encoder: TextEncoder, numbers: Iterator[int], size: int) -> object:
    """Encode prompts that are not in the cache."""
    return text_encoder.encode_all([f"{PROMPT} {size} {next(numbers)}" for _ in range(size)])


def _decode(decoder: Decoder, latents: Tensor, size: int) -> object:
    return decoder.decode(latents[:size])


def _denoise(engine: DiffusionEngine, model: LoadedModel, params: SamplingParams) -> Callable[[int], object]:
    """Return a function that calls the denoiser with a number of samples."""
    device, steps, count = model.denoiser.device, params.num_inference_steps, engine.config.max_batch_size
    latents = torch.randn(count, *model.latent_shape(params)).to(device)
    table = model.recipe.step_table(steps, params.width, params.height)
    timesteps = torch.full((count,), float(table.timesteps[0]), device=device)
    step_counts = torch.full((count,), steps, device=device)
    prompts: list[Conditioning] = []
    engine.run_on_thread(lambda: prompts.append(model.conditioning(model.text_encoder.encode(params.prompt), params)))

    def call(size: int) -> object:
        prompt = stacked(prompts * size)
        output = denoise([model] * size, latents[:size], timesteps[:size], step_counts[:size], prompt)
        return output.sum().item()  # waits until a GPU is done

    return call


def _learn(engine: DiffusionEngine, kind: Kind, call: Callable[[int], object], capacity: int | None = None) -> None:
    """Measure a kind of call at 1, 2, 4, ... samples, until two sizes in a row give no more samples a second."""
    times_s: dict[int, list[float]] = {}
    size, without_gain = 1, 0
    while size <= (capacity or engine.config.max_batch_size) and without_gain < 2:
        try:
            _seconds(engine, call, size)  # the first call may compile
            times_s[size] = _times(engine, call, size)
        except (torch.OutOfMemoryError, MemoryError):
            if size == 1:
                raise
            break
        without_gain = 0 if _fastest(times_s) == size else without_gain + 1
        size *= 2
    for _ in range(PASSES - 1):  # several passes, so that a slow moment of the machine does not hit one size alone
        for size in times_s:
            times_s[size] += _times(engine, call, size)
    for size, seen_s in times_s.items():
        engine.observe(kind, size, min(seen_s) + BOOKKEEPING_S)  # real calls teach the usual slowness
    engine.limit(kind, max(times_s))


def _fastest(times_s: Mapping[int, Sequence[float]]) -> int:
    """Return the smallest size whose samples a second are within `MIN_GAIN` of the best."""
    rates = {size: size / min(seen_s) for size, seen_s in times_s.items()}
    return next(size for size, rate in rates.items() if rate * (1 + MIN_GAIN) >= max(rates.values()))


def _times(engine: DiffusionEngine, call: Callable[[int], object], size: int) -> list[float]:
    """Return the seconds of several calls of one size."""
    times_s: list[float] = []
    ends_s = time.monotonic() + PASS_S
    while len(times_s) < ROUNDS and (not times_s or time.monotonic() < ends_s):
        times_s.append(_seconds(engine, call, size))
    return times_s


def _seconds(engine: DiffusionEngine, call: Callable[[int], object], size: int) -> float:
    """Return the seconds of one call on the engine's thread."""
    times_s: list[float] = []

    def run() -> None:
        began_s = time.monotonic()
        call(size)
        times_s.append(time.monotonic() - began_s)

    engine.run_on_thread(run)
    return times_s[0]
