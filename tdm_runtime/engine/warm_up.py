"""Warm-up: runs the kinds of calls before the first request and measures their costs.

A quick model is measured at every native size and batch size that may help. A slow one is measured as far as the time
limits below allow; the time that a backend takes to compile does not count. Sizes that were left out take their costs
from the nearest measured one (`CostModel`), until requests have measured them.
"""

from __future__ import annotations

import itertools
import logging
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from tdm_runtime.edit import GivenPicture
from tdm_runtime.engine.delivery import Delivery
from tdm_runtime.engine.engine import DiffusionEngine
from tdm_runtime.engine.intake import call_kind, joined
from tdm_runtime.families.conditioning import Conditioning
from tdm_runtime.model.decoder import Decoder
from tdm_runtime.model.encoder import PictureEncoder
from tdm_runtime.model.loaded_model import LoadedModel, denoise
from tdm_runtime.model.text_encoder import TextEncoder, stacked
from tdm_runtime.params import SamplingParams
from tdm_runtime.scheduling.cost_model import MIN_GAIN, Kind

logger = logging.getLogger(__name__)

PASSES = 5
"""Number of times that all sizes are measured, one after the other."""
PASS_S = 0.05
"""Most seconds of calls of one size in a pass, apart from a single call that takes longer. A pass gives all sizes the
time of a call of the largest one: single calls would favour small sizes, which a busy moment of the machine hits less
often."""
KIND_S = 4.0
"""Seconds for the measured calls of one kind. Batches that would take longer are not measured and never made: one
sample of such a model keeps the machine busy."""
MODEL_S = 20.0
"""Seconds of measured calls of a model after which no further native size is measured."""
PICTURES_S = 10.0
"""Seconds after which no further whole picture is made."""
MOST_ENCODED = 4
"""Most given pictures that share a call. Each further size is another program to compile at every start."""
BOOKKEEPING_S = 3e-4
"""Approximate time that the engine adds to each call of the model, whatever its size."""
PROMPT = "warm-up"


def warm_up(engine: DiffusionEngine, model: LoadedModel | None = None) -> None:
    """Measure the kinds of calls of a model, then make pictures of its sizes, step counts and decoders.

    At least the first native size is measured and one picture made. The engine may be serving meanwhile: each call runs
    between two of its own.

    Args:
        model: Model to warm up; None is the engine's own.

    Raises:
        TDMError: The model cannot make a picture.
    """
    model = model or engine.model
    _learn_costs(engine, model)
    ends_s = time.monotonic() + PICTURES_S
    for params, delivery in _pictures(model):
        engine.submit(params, delivery, model).result()
        if time.monotonic() > ends_s:
            break


def _pictures(model: LoadedModel) -> Iterator[tuple[SamplingParams, Delivery]]:
    """Return the pictures of a warm-up, those of the fewest steps first."""
    recipe = model.recipe
    for steps, decoder, (width, height) in itertools.product(recipe.step_counts, model.decoders, recipe.native_sizes):
        yield SamplingParams(PROMPT, 0, steps, width, height, decoder, frames=recipe.default_frames), Delivery()
    width, height = recipe.native_sizes[0]
    shown = SamplingParams(PROMPT, 0, recipe.step_counts[-1], width, height, frames=recipe.default_frames)
    yield shown, Delivery(on_preview=lambda preview: None, num_previews=1)


def _learn_costs(engine: DiffusionEngine, model: LoadedModel) -> None:
    numbers, text = itertools.count(), call_kind(model, "text")
    most = None if model.text_encoder.encoder.shares_calls else 1
    spent_s = _learn(engine, text, partial(_encode, model.text_encoder, numbers), most)
    spent_s += _learn_encoder(engine, model)
    for width, height in model.recipe.native_sizes:
        if spent_s > MODEL_S:
            logger.info(
                "%s is slow; sizes from %dx%d on are not measured before they are used", model.name, width, height
            )
            return
        steps, frames = model.recipe.default_steps, model.recipe.default_frames
        params = SamplingParams(PROMPT, 0, steps, width, height, frames=frames)
        shape = model.latent_shape(params)
        spent_s += _learn(engine, call_kind(model, "denoise", shape), _denoise(engine, model, params))
        if model.reads_references and (width, height) == model.recipe.native_sizes[0]:
            params = replace(params, references=(GivenPicture(np.zeros((height, width, 3), np.uint8)),))
            kind = call_kind(model, "denoise", joined([shape, *model.reference_shapes(params)]))
            spent_s += _learn(engine, kind, _denoise(engine, model, params))
        for name, decoder in model.decoders.items():
            calls = decoder.calls(shape)
            kind = call_kind(model, f"decode:{name}", calls.shape)
            if engine.call_seconds(kind):
                continue  # a LoRA and its base share the decoder
            most = engine.config.max_batch_size if calls.number == 1 else 1
            latents = torch.zeros(most, *calls.shape, device=model.denoiser.device)
            spent_s += _learn(engine, kind, partial(_decode, decoder, latents), most)


def _learn_encoder(engine: DiffusionEngine, model: LoadedModel) -> float:
    """Measure the encoder of given pictures at the first native size. Returns the seconds of the measured calls."""
    if model.encoder is None:
        return 0.0
    width, height = model.recipe.native_sizes[0]
    shape = model.latent_shape(SamplingParams(PROMPT, 0, model.recipe.default_steps, width, height))
    kind = call_kind(model, "encode_image", shape)
    if engine.call_seconds(kind):
        return 0.0  # LoRAs share the encoder of their base
    most = min(MOST_ENCODED, engine.config.max_batch_size) if model.encoder.shares_calls else 1
    pixels = torch.zeros(most, 3, height, width, device=model.encoder.backend.device)
    return _learn(engine, kind, partial(_encode_pictures, model.encoder, pixels), most)


def _encode(text_encoder: TextEncoder, numbers: Iterator[int], size: int) -> object:
    """Encode prompts that are not in the cache."""
    return text_encoder.encode_all([text_encoder.key(f"{PROMPT} {size} {next(numbers)}") for _ in range(size)])


def _encode_pictures(encoder: PictureEncoder, pixels: Tensor, size: int) -> object:
    return encoder.encode(pixels[:size]).sum().item()


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
    engine.run_on_thread(lambda: prompts.append(model.conditioning(model.embedding(params), params)))

    def call(size: int) -> object:
        prompt = stacked(prompts * size)
        output = denoise([model] * size, latents[:size], timesteps[:size], step_counts[:size], prompt)
        return output.sum().item()  # waits until a GPU is done

    return call


def _learn(engine: DiffusionEngine, kind: Kind, call: Callable[[int], object], capacity: int | None = None) -> float:
    """Measure a kind of call at 1, 2, 4, ... samples, until two sizes in a row give no more samples a second.

    Returns:
        The seconds of the measured calls, about `KIND_S` at most unless a single sample takes longer.
    """
    passes: list[dict[int, float]] = [{}]
    spent_s, size, sure_of = 0.0, 1, 0

    def measure(size: int) -> None:
        nonlocal spent_s
        times_s = _times(engine, call, size, min(PASS_S, max(_costs(passes).values(), default=0.0)))
        spent_s += sum(times_s)
        passes[-1][size] = sum(times_s) / len(times_s)

    def measure_again() -> None:
        nonlocal sure_of
        sure_of = max(passes[0])
        for _ in range(PASSES - 1):
            passes.append({})
            for size, seconds in _costs(passes).items():
                if spent_s + seconds < KIND_S:
                    measure(size)

    while size <= (capacity or engine.config.max_batch_size):
        if size > 1 and spent_s + 2 * _costs(passes)[size // 2] > KIND_S:
            break
        try:
            _seconds(engine, call, size)  # the first call may compile
            measure(size)
        except (torch.OutOfMemoryError, MemoryError):
            if size == 1:
                raise
            break
        if 4 * _fastest(_costs(passes)) <= size and not sure_of:  # or was it a slow moment?
            measure_again()
            passes = [_costs(passes)]
        if 4 * _fastest(_costs(passes)) <= size:
            break
        size *= 2
    if sure_of < max(passes[0]):
        measure_again()
    costs = _costs(passes)
    for size, seconds in costs.items():
        engine.observe(kind, size, seconds + BOOKKEEPING_S)  # real calls teach the usual slowness
    engine.limit(kind, max(costs))
    return spent_s


def _costs(passes: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """Return the seconds of a call of each size, ascending, from passes that measured the sizes one after the other.

    The smallest size has its least time. Each further size has the time of the one before it times the median, over the
    passes, of how much longer it took: a moment in which the machine is slow, or fast, hits two neighbours alike.
    """
    costs: dict[int, float] = {}
    for size in sorted(passes[0]):
        before = size // 2
        longer = [each[size] / each[before] for each in passes if before in each and size in each]
        least_s = min(each[size] for each in passes if size in each)
        costs[size] = costs[before] * statistics.median(longer) if longer else least_s
    return costs


def _fastest(seconds: Mapping[int, float]) -> int:
    """Return the smallest size whose samples a second are within `MIN_GAIN` of the best."""
    rates = {size: size / seconds[size] for size in seconds}
    return next(size for size, rate in rates.items() if rate * (1 + MIN_GAIN) >= max(rates.values()))


def _times(engine: DiffusionEngine, call: Callable[[int], object], size: int, pass_s: float) -> list[float]:
    """Return the seconds of the calls of one size in a pass of `pass_s`, at least one."""
    times_s: list[float] = []
    while not times_s or sum(times_s) < pass_s:
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
