"""Latency of each step count, and PSNR of its pictures against those of the largest step count."""

from __future__ import annotations

import itertools
import statistics
import time

from benchmarks.plots import Quality
from benchmarks.workload import Workload
from tdm_runtime.media.image_file import encode_image
from tdm_runtime.model.decoder import Pixels
from tdm_runtime.model.loaded_model import LoadedModel
from tdm_runtime.model.similarity import psnr_db
from tdm_runtime.params import SamplingParams
from tdm_runtime.pipeline import generate


def quality_per_step_count(model: LoadedModel, pictures: int, seed: int = 0) -> list[Quality]:
    """Make the same pictures at every step count, one at a time, text to PNG.

    PSNR against the picture of the largest step count shows how much the later steps still change, not which
    picture is better.
    """
    recipe = model.recipe
    width, height = recipe.native_sizes[0]
    made: dict[int, list[Pixels]] = {steps: [] for steps in recipe.step_counts}
    times_ms: dict[int, list[float]] = {steps: [] for steps in recipe.step_counts}
    requests = list(itertools.islice(Workload(seed).requests(), pictures))
    for steps in recipe.step_counts:
        generate(model, SamplingParams("warm-up", 0, steps, width, height))
    for request in requests:
        started_s = time.perf_counter()
        model.text_encoder.encode(request.prompt)  # cached from here on, so its time is added to each step count
        text_ms = 1e3 * (time.perf_counter() - started_s)
        for steps in recipe.step_counts:  # in turns, so that changes in the machine's speed affect all alike
            started_s = time.perf_counter()
            pixels = generate(model, SamplingParams(request.prompt, request.seed, steps, width, height))
            encode_image(pixels, "png")
            times_ms[steps].append(text_ms + 1e3 * (time.perf_counter() - started_s))
            made[steps].append(pixels)
    most = max(recipe.step_counts)
    return [
        Quality(
            steps,
            statistics.median(times_ms[steps]),
            None if steps == most else statistics.fmean(map(psnr_db, made[steps], made[most])),
        )
        for steps in recipe.step_counts
    ]
