"""The images API behind the routes: an engine, a codec, metrics. Knows nothing of HTTP or Ray."""

from __future__ import annotations

import asyncio
import base64
import itertools
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from serving.config import ServerConfig
from serving.errors import not_ready
from serving.metrics import ServerMetrics
from serving.schema import (
    GeneratedImage,
    ImageRequest,
    ImageResponse,
    ImageTimings,
    InputTokenDetails,
    ModelCard,
    ModelList,
    Usage,
)
from tdm_runtime.backend_choice import load_model
from tdm_runtime.codec import describe_parameters, encode_image
from tdm_runtime.engine import DiffusionEngine
from tdm_runtime.loaded_model import LoadedModel
from tdm_runtime.params import SamplingParams
from tdm_runtime.recipe import RECIPE_FILE
from tdm_runtime.sample import Picture
from tdm_runtime.text_encoder import PromptEmbedding

logger = logging.getLogger(__name__)


class ImageService:
    """One model and its engine."""

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.metrics = ServerMetrics()
        torch.set_num_threads(1)  # of this thread: only the engine's may have more, see loaded_model
        self.model: LoadedModel = load_model(config.checkpoint, config.backend)
        logger.info("%s runs on %s", self.model.recipe.name, self.model.choice or self.model.backend)
        self.engine = DiffusionEngine(self.model, config.engine, self.metrics.observe_batch)
        self.metrics.watch(self.engine)
        self._created = int((config.checkpoint / RECIPE_FILE).stat().st_mtime)
        self.num_active = 0
        """HTTP requests not yet answered, counted by the HTTP edge."""
        self._is_draining = False
        self.engine.start()
        warm_up(self.engine)

    @property
    def is_ready(self) -> bool:
        """Whether new requests are taken."""
        return self.engine.is_healthy and not self._is_draining

    async def drain(self) -> None:
        """Refuse pictures with 503 from here on; return when every accepted request is answered."""
        self._is_draining = True
        while self.num_active:
            await asyncio.sleep(0.01)

    def close(self) -> None:
        """Finish what was accepted, then stop."""
        self.engine.close()

    def models(self) -> ModelList:
        recipe = self.model.recipe
        card = ModelCard(
            id=recipe.name,
            created=self._created,
            sizes=[f"{width}x{height}" for width, height in recipe.native_sizes],
            step_counts=list(recipe.step_counts),
            default_steps=recipe.default_steps,
            decoders=list(self.model.decoders),
            backend=self.model.backend,
            parity_psnr_db={steps: round(found.psnr_db, 1) for steps, found in self.model.parity.items()},
            digest=self.model.digest,
        )
        return ModelList(data=[card])

    async def generate(self, request: ImageRequest) -> ImageResponse:
        """Make a request's pictures.

        Cancelling this coroutine, or one picture's failure, cancels its pictures at the next step boundary.

        Raises:
            InvalidRequestError, APIError: the request's mistake.
            OverloadedError: the queue is full.
            GenerationError: a picture failed.
            TimeoutError: not done within `request_timeout_s`.
        """
        if self._is_draining:
            raise not_ready("the server is stopping; send the request to another")
        started_s = time.monotonic()
        params = request.to_sampling_params(self.model.recipe)
        futures = self.engine.submit_all(params)
        try:
            async with asyncio.timeout(self.config.request_timeout_s):
                pictures = await asyncio.gather(*map(asyncio.wrap_future, futures))
        finally:
            for future in futures:
                future.cancel()  # a finished one is not changed by this
        encoding_s = time.monotonic()
        images = await asyncio.to_thread(self._encode, pictures, request)
        ended_s = time.monotonic()
        timings = self._timings(pictures, 1e3 * (ended_s - encoding_s), 1e3 * (ended_s - started_s))
        self.metrics.observe_request(timings)
        self.metrics.steps_used.labels(params[0].num_inference_steps).inc(len(pictures))
        return ImageResponse(
            created=int(time.time()),
            data=images,
            model=self.model.recipe.name,
            output_format=request.output_format,
            size=f"{params[0].width}x{params[0].height}",
            usage=self._usage(pictures),
            timings=timings,
            warnings=_warnings(pictures[0].prompt),
        )

    def _encode(self, pictures: Sequence[Picture], request: ImageRequest) -> list[GeneratedImage]:
        images = []
        for picture in pictures:
            params = picture.params
            text = describe_parameters(params, self.model.recipe, self.model.digest) if request.metadata else None
            encoded = encode_image(
                picture.pixels, request.output_format, compression=request.output_compression, parameters=text
            )
            b64_json = base64.b64encode(encoded).decode("ascii")
            images.append(
                GeneratedImage(b64_json=b64_json, seed=params.seed, num_inference_steps=params.num_inference_steps)
            )
        return images

    def _usage(self, pictures: Sequence[Picture]) -> Usage:
        first = pictures[0]
        text_tokens = min(first.prompt.num_tokens, first.prompt.max_tokens)
        _, height, width = self.model.latent_shape(first.params)
        output_tokens = height * width * len(pictures)
        return Usage(
            input_tokens=text_tokens,
            input_tokens_details=InputTokenDetails(text_tokens=text_tokens),
            output_tokens=output_tokens,
            total_tokens=text_tokens + output_tokens,
        )

    @staticmethod
    def _timings(pictures: Sequence[Picture], encode_ms: float, total_ms: float) -> ImageTimings:
        slowest = max((picture.timings for picture in pictures), key=lambda t: t.queue_ms + sum(t.steps_ms))
        return ImageTimings(
            queue_ms=slowest.queue_ms,
            text_ms=slowest.text_ms,
            steps_ms=slowest.steps_ms,
            decode_ms=slowest.decode_ms,
            encode_ms=encode_ms,
            total_ms=total_ms,
        )


def warm_up(engine: DiffusionEngine) -> None:
    """Run every size, step count, decoder and power-of-two batch once, so that no request pays for a first time.

    Raises:
        TDMError: the model cannot make a picture; better now than at the first request.
    """
    recipe = engine.model.recipe
    limit = min(engine.config.max_batch_size, engine.config.max_live)
    batch_sizes = [1 << n for n in range(limit.bit_length())]
    for (width, height), decoder in itertools.product(recipe.native_sizes, engine.model.decoders):
        for size, steps in itertools.zip_longest(batch_sizes, recipe.step_counts, fillvalue=1):
            params = SamplingParams("warm-up", 0, steps, width, height, decoder)
            for future in engine.submit_all([replace(params, seed=seed) for seed in range(size)]):
                future.result()


def _warnings(prompt: PromptEmbedding) -> list[str]:
    if not prompt.is_truncated:
        return []
    return [f"the prompt has {prompt.num_tokens} tokens; the model read the first {prompt.max_tokens}"]


def check_static_files(folder: Path) -> None:
    """Fail at start where the playground's files are missing."""
    if missing := [name for name in ("index.html", "playground.js", "playground.css") if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}; reinstall the package")
