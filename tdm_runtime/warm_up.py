"""Before the first request: run everything once, so that none pays for a first time, and learn what calls cost."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from tdm_runtime.cost_model import MIN_GAIN, Kind
from tdm_runtime.decoder import Decoder
from tdm_runtime.delivery import Delivery
from tdm_runtime.engine import DiffusionEngine
from tdm_runtime.forecast import TEXT
from tdm_runtime.params import SamplingParams

ROUNDS = 7
MEASURE_S = 2.0
"""A measurement ends after so many rounds or seconds, whichever is first."""
PROMPT = "warm-up"


def warm_up(engine: DiffusionEngine) -> None:
    """Run every size, step count and decoder, in batches that grow until they do not help.

    Raises:
        TDMError: the model cannot make a picture; better now than at the first request.
    """
    engine.run_on_thread(lambda: _learn_costs(engine))
    recipe = engine.model.recipe
    for (width, height), decoder, steps in itertools.product(
        recipe.native_sizes, engine.model.decoders, recipe.step_counts
    ):
        engine.submit(SamplingParams(PROMPT, 0, steps, width, height, decoder)).result()
    width, height = recipe.native_sizes[0]
    params = SamplingParams(PROMPT, 0, recipe.step_counts[-1], width, height)
    engine.submit(params, Delivery(on_preview=lambda preview: None)).result()


def _learn_costs(engine: DiffusionEngine) -> None:
    model = engine.model
    prompts = (f"{PROMPT} {n}" for n in itertools.count())
    _learn(engine, TEXT, lambda size: model.text_encoder.encode_all([next(prompts) for _ in range(size)]), capacity=1)
    for width, height in model.recipe.native_sizes:
        params = SamplingParams(PROMPT, 0, model.recipe.default_steps, width, height)
        shape = model.latent_shape(params)
        _learn(engine, Kind("denoise", shape), _denoise(engine, params))
        for name, decoder in model.decoders.items():
            latents = torch.zeros(engine.config.max_batch_size, *shape, device=model.denoiser.device)
            _learn(engine, Kind(f"decode:{name}", shape), partial(_decode, decoder, latents))


def _decode(decoder: Decoder, latents: Tensor, size: int) -> object:
    return decoder.decode(latents[:size])


def _denoise(engine: DiffusionEngine, params: SamplingParams) -> Callable[[int], object]:
    """A denoiser call of any number of samples."""
    model, steps = engine.model, params.num_inference_steps
    device, count = model.denoiser.device, engine.config.max_batch_size
    latents = torch.randn(count, *model.latent_shape(params)).to(device)
    timesteps = torch.full((count,), float(model.recipe.step_tables[steps].timesteps[0]), device=device)
    step_counts = torch.full((count,), steps, device=device)
    embeds = torch.stack([model.text_encoder.encode(params.prompt).prompt_embeds] * count)

    def call(size: int) -> object:
        output = model.denoiser(latents[:size], timesteps[:size], step_counts[:size], embeds[:size])
        return output.sum().item()  # waits for a GPU

    return call


def _learn(engine: DiffusionEngine, kind: Kind, call: Callable[[int], object], capacity: int | None = None) -> None:
    """Measure a kind of call at 1, 2, 4, ... samples, as long as more of them give more a second."""
    best_rate, useful = 0.0, 1
    for size in _doublings(capacity or engine.config.max_batch_size):
        try:
            times_s = _times(call, size)
        except (torch.OutOfMemoryError, MemoryError):
            if size == 1:
                raise
            break
        engine.observe(kind, size, statistics.median(times_s))
        rate = size / min(times_s)
        if rate < best_rate * (1 + MIN_GAIN):
            break
        best_rate, useful = rate, size
    engine.limit(kind, useful)


def _doublings(limit: int) -> Iterator[int]:
    return (1 << n for n in range(limit.bit_length()))


def _times(call: Callable[[int], object], size: int) -> list[float]:
    """Seconds of some calls, after a first."""
    call(size)
    times_s: list[float] = []
    ends_s = time.monotonic() + MEASURE_S
    while len(times_s) < ROUNDS and (not times_s or time.monotonic() < ends_s):
        began_s = time.monotonic()
        call(size)
        times_s.append(time.monotonic() - began_s)
    return times_s
