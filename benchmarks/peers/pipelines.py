"""Pipelines of the peers: the stock diffusers pipeline, OpenVINO GenAI's, or this runtime's backend in a plain loop."""

from __future__ import annotations

import argparse
import io
import os
import shlex
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from tdm_runtime.checkpoint.folder import open_checkpoint
from tdm_runtime.model.artifacts import BackendConfig
from tdm_runtime.model.decoder import Pixels
from tdm_runtime.model.loaded_model import LoadedModel, denoise
from tdm_runtime.model.text_encoder import stacked
from tdm_runtime.params import SamplingParams
from tdm_runtime.sampling.noise import SeedNoise
from tdm_runtime.sampling.sampler import solve

PeerBackend = Literal["stock-fp32", "stock-bf16", "openvino-genai", "ours"]
PEER_BACKENDS: tuple[PeerBackend, ...] = get_args(PeerBackend)

OUR_ARGUMENTS = "TDM_BENCH_OUR_ARGUMENTS"
"""Environment variable with the arguments of our server, whose backend the peers with `ours` run too."""
MAX_BATCH_SIZE = 8
"""Largest batch of the peers that batch. Stock fp32 at 4 steps on 2 cores takes 81, 51, 48 and 35 ms per picture in
batches of 1, 2, 4 and 8; larger batches double the latency and gain little."""


@dataclass(frozen=True)
class Job:
    """Request for one picture."""

    prompt: str
    seed: int
    num_inference_steps: int


class Pipeline(Protocol):
    """Maker of batches of pictures."""

    def make(self, prompts: Sequence[str], seeds: Sequence[int], steps: int) -> list[bytes]:
        """Return the PNG bytes of each picture; there is one prompt and one seed per picture."""


class StockPipeline:
    """`StableDiffusionPipeline` as its documentation shows it: lists of prompts and generators make a batch."""

    def __init__(self, checkpoint: Path, dtype: torch.dtype) -> None:
        from diffusers import StableDiffusionPipeline

        self._pipeline: Any = StableDiffusionPipeline.from_pretrained(checkpoint, dtype=dtype)
        self._pipeline.set_progress_bar_config(disable=True)
        self._width, self._height = open_checkpoint(checkpoint).recipe.native_sizes[0]

    def make(self, prompts: Sequence[str], seeds: Sequence[int], steps: int) -> list[bytes]:
        pictures = self._pipeline(
            list(prompts),
            num_inference_steps=steps,
            guidance_scale=steps + 1.0,  # passes K to the denoiser; there is no guidance
            width=self._width,
            height=self._height,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        ).images
        return [_png(picture) for picture in pictures]


class OurPipeline:
    """This runtime's model. Each batch runs all its steps before the next batch starts."""

    def __init__(self, model: LoadedModel) -> None:
        self._model = model
        self.backend = model.backend

    def make(self, prompts: Sequence[str], seeds: Sequence[int], steps: int) -> list[bytes]:
        from tdm_runtime.media.image_file import encode_image

        width, height = self._model.recipe.native_sizes[0]
        batch = [
            SamplingParams(prompt, seed, steps, width, height) for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        return [encode_image(pixels, "png") for pixels in generate_batch(self._model, batch)]


@torch.inference_mode()
def generate_batch(model: LoadedModel, batch: Sequence[SamplingParams]) -> list[Pixels]:
    """Make pictures, uint8 [H, W, 3] each. All requests must have the same step count, size and decoder."""
    for params in batch:
        model.check(params)
    first = batch[0]
    table = model.recipe.step_table(first.num_inference_steps, first.width, first.height)
    device = model.denoiser.device
    shape = (1, *model.latent_shape(first))
    prompt = stacked([model.conditioning(model.text_encoder.encode(params.prompt), params) for params in batch])
    step_counts = torch.full((len(batch),), first.num_inference_steps, device=device)
    noises = [SeedNoise(params.seed, shape) for params in batch]

    def predict(latents: Tensor, timesteps: Tensor) -> Tensor:
        return denoise([model] * len(batch), latents, timesteps, step_counts, prompt)

    def step_noise(step_index: int) -> Tensor:
        return torch.cat([noise.of_step(step_index) for noise in noises])

    initial = torch.cat([noise.initial() for noise in noises])
    *_, (latents, _) = solve(table, initial.to(device), predict, step_noise)
    return list(model.decoders[first.decoder].decode(latents))


def make_grouped(pipeline: Pipeline, jobs: Sequence[Job]) -> list[bytes]:
    """Make a mixed batch with one pipeline call per step count. Returns the pictures in the order of `jobs`."""
    groups: dict[int, list[int]] = {}
    for index, job in enumerate(jobs):
        groups.setdefault(job.num_inference_steps, []).append(index)
    pictures: dict[int, bytes] = {}
    for steps, indices in groups.items():
        made = pipeline.make([jobs[i].prompt for i in indices], [jobs[i].seed for i in indices], steps)
        pictures |= zip(indices, made, strict=True)
    return [pictures[index] for index in range(len(jobs))]


def our_backend() -> BackendConfig:
    """Return the backend of our server, by the arguments in `OUR_ARGUMENTS`; without them it is "auto"."""
    from tdm_runtime.cli import add_backend_arguments, backend_config

    parser = argparse.ArgumentParser()
    add_backend_arguments(parser)
    given, _ = parser.parse_known_args(shlex.split(os.environ.get(OUR_ARGUMENTS, "")))
    return backend_config(given)


def load_pipeline(backend: PeerBackend, checkpoint: Path, max_batch_size: int) -> Pipeline:
    """Load a pipeline and warm it up with every batch size that can occur.

    OpenVINO compiles a program for each power of two at first use; a request should not wait for that.
    """
    pipeline: Pipeline
    if backend == "ours":
        from tdm_runtime.model.choice import load_model

        model = load_model(checkpoint, our_backend())
        print(f"backend: {model.choice or model.backend}", flush=True)
        pipeline = OurPipeline(model)
    elif backend == "openvino-genai":
        from benchmarks.peers.genai import GenAIPipeline

        pipeline = GenAIPipeline(checkpoint, "bf16")
    else:
        pipeline = StockPipeline(checkpoint, torch.bfloat16 if backend == "stock-bf16" else torch.float32)
    steps = open_checkpoint(checkpoint).recipe.default_steps
    for size in range(1, max_batch_size + 1):
        pipeline.make(["warm-up"] * size, range(size), steps)
    return pipeline


class OneThread:
    """Pipeline that is loaded and called in one thread of its own; calls wait in a queue.

    Each thread that calls torch gets its own team of OpenMP workers. With only a lock, the threads of a pool
    take turns, and there are soon more workers than cores: 4 steps of stock fp32 took 140 to 170 ms that way,
    and 75 to 80 ms in one thread.
    """

    def __init__(self, load: Callable[[], Pipeline]) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pipeline")
        self._pipeline = self._thread.submit(load).result()

    def submit(self, jobs: Sequence[Job]) -> Future[list[bytes]]:
        """Return a future of the PNG bytes of each job. Jobs with the same step count are made together."""
        return self._thread.submit(make_grouped, self._pipeline, jobs)

    def close(self) -> None:
        """Stop the thread. Calls that have not started are dropped."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def _png(picture: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "PNG", compress_level=1)  # the level of `encode_image`: zlib costs all servers the same
    return stream.getvalue()
