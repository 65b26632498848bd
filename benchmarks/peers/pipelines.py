"""What the peers serve: the stock diffusers pipeline, or this runtime's backend in a plain loop."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from tdm_runtime.checkpoint.folder import open_checkpoint
from tdm_runtime.model.decoder import Pixels
from tdm_runtime.model.loaded_model import LoadedModel, denoise
from tdm_runtime.model.text_encoder import conditioning_of
from tdm_runtime.params import SamplingParams
from tdm_runtime.sampling.noise import initial_noise
from tdm_runtime.sampling.sampler import solve

PeerBackend = Literal["stock-fp32", "stock-bf16", "ours"]
PEER_BACKENDS: tuple[PeerBackend, ...] = get_args(PeerBackend)

MAX_BATCH_SIZE = 8
"""Of every batching peer. Stock fp32, 4 steps, ms a picture on 2 cores, in batches of 1, 2, 4 and 8: 81, 51, 48, 35;
beyond, latency doubles for little."""


@dataclass(frozen=True)
class Job:
    """One picture that was asked for."""

    prompt: str
    seed: int
    num_inference_steps: int


class Pipeline(Protocol):
    """Makes a batch of pictures in one go."""

    def make(self, prompts: Sequence[str], seeds: Sequence[int], steps: int) -> list[bytes]:
        """Return PNG bytes of each; one prompt, one seed a picture."""


class StockPipeline:
    """`StableDiffusionPipeline` as its documentation shows it: lists of prompts and of generators make a batch."""

    def __init__(self, checkpoint: Path, dtype: torch.dtype) -> None:
        from diffusers import StableDiffusionPipeline

        self._pipeline: Any = StableDiffusionPipeline.from_pretrained(checkpoint, dtype=dtype)
        self._pipeline.set_progress_bar_config(disable=True)
        self._width, self._height = open_checkpoint(checkpoint).recipe.native_sizes[0]

    def make(self, prompts: Sequence[str], seeds: Sequence[int], steps: int) -> list[bytes]:
        pictures = self._pipeline(
            list(prompts),
            num_inference_steps=steps,
            guidance_scale=steps + 1.0,  # how a stock pipeline tells the denoiser its K; nothing is guided
            width=self._width,
            height=self._height,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        ).images
        return [_png(picture) for picture in pictures]


class OurPipeline:
    """This runtime's model; every batch runs from its first step to its last before the next one starts."""

    def __init__(self, model: LoadedModel) -> None:
        self._model = model

    def make(self, prompts: Sequence[str], seeds: Sequence[int], steps: int) -> list[bytes]:
        from tdm_runtime.media.image_file import encode_image

        width, height = self._model.recipe.native_sizes[0]
        batch = [
            SamplingParams(prompt, seed, steps, width, height) for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        return [encode_image(pixels, "png") for pixels in generate_batch(self._model, batch)]


@torch.inference_mode()
def generate_batch(model: LoadedModel, batch: Sequence[SamplingParams]) -> list[Pixels]:
    """Make the pictures of requests that have one step count, one size and one decoder; uint8 [H, W, 3] each."""
    for params in batch:
        model.check(params)
    first = batch[0]
    table = model.recipe.step_tables[first.num_inference_steps]
    device = model.denoiser.device
    shape = (1, *model.latent_shape(first))
    prompt = conditioning_of([model.text_encoder.encode(params.prompt) for params in batch])
    step_counts = torch.full((len(batch),), first.num_inference_steps, device=device)
    noise = torch.cat([initial_noise(params.seed, shape) for params in batch])

    def predict(latents: Tensor, timesteps: Tensor) -> Tensor:
        return denoise([model] * len(batch), latents, timesteps, step_counts, prompt)

    *_, (latents, _) = solve(table, noise.to(device), predict)
    return list(model.decoders[first.decoder].decode(latents))


def make_grouped(pipeline: Pipeline, jobs: Sequence[Job]) -> list[bytes]:
    """Make a mixed batch, one pipeline call for each step count in it; answers in the order of `jobs`."""
    groups: dict[int, list[int]] = {}
    for index, job in enumerate(jobs):
        groups.setdefault(job.num_inference_steps, []).append(index)
    pictures: dict[int, bytes] = {}
    for steps, indices in groups.items():
        made = pipeline.make([jobs[i].prompt for i in indices], [jobs[i].seed for i in indices], steps)
        pictures |= zip(indices, made, strict=True)
    return [pictures[index] for index in range(len(jobs))]


def load_pipeline(backend: PeerBackend, checkpoint: Path, max_batch_size: int) -> Pipeline:
    """Load, and make a picture of every batch size that can occur.

    OpenVINO compiles a program for each power of two that it meets; a request should not wait for that.
    """
    pipeline: Pipeline
    if backend == "ours":
        from tdm_runtime.model.artifacts import BackendConfig
        from tdm_runtime.model.choice import load_model

        model = load_model(checkpoint, BackendConfig("auto", threads=0))
        print(f"backend: {model.choice or model.backend}", flush=True)
        pipeline = OurPipeline(model)
    else:
        pipeline = StockPipeline(checkpoint, torch.bfloat16 if backend == "stock-bf16" else torch.float32)
    steps = open_checkpoint(checkpoint).recipe.default_steps
    for size in range(1, max_batch_size + 1):
        pipeline.make(["warm-up"] * size, range(size), steps)
    return pipeline


class OneThread:
    """A pipeline that is loaded and run in one thread of its own: whoever asks, waits in line.

    A torch operation starts a team of OpenMP workers for each thread that calls one. Behind a lock alone,
    where a pool's threads take turns, there are soon more workers than cores: 4 steps of stock fp32 took
    140 to 170 ms so, and 75 to 80 ms from one thread.
    """

    def __init__(self, load: Callable[[], Pipeline]) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pipeline")
        self._pipeline = self._thread.submit(load).result()

    def submit(self, jobs: Sequence[Job]) -> Future[list[bytes]]:
        """PNG bytes of each, later; those of one step count are made together."""
        return self._thread.submit(make_grouped, self._pipeline, jobs)

    def close(self) -> None:
        """What has not begun is dropped."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def _png(picture: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "PNG", compress_level=1)  # as `encode_image`: no peer loses by zlib
    return stream.getvalue()
