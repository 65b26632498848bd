"""The images API behind the routes: an engine, a codec, metrics. Knows nothing of HTTP or Ray."""

from __future__ import annotations

import asyncio
import base64
import gc
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from pathlib import Path

import torch

from serving.config import ServerConfig
from serving.errors import not_ready
from serving.metrics import ServerMetrics
from serving.schema import (
    CompletedImage,
    GeneratedImage,
    ImageRequest,
    ImageResponse,
    ImageTimings,
    InputTokenDetails,
    ModelCard,
    ModelList,
    PartialImage,
    Usage,
)
from tdm_runtime.backend_choice import load_model
from tdm_runtime.codec import describe_parameters, encode_image
from tdm_runtime.cost_model import Kind
from tdm_runtime.delivery import Preview
from tdm_runtime.engine import DiffusionEngine
from tdm_runtime.loaded_model import LoadedModel
from tdm_runtime.params import SamplingParams
from tdm_runtime.receipt import receipt_of
from tdm_runtime.recipe import RECIPE_FILE
from tdm_runtime.sample import Picture
from tdm_runtime.text_encoder import PromptEmbedding
from tdm_runtime.warm_up import warm_up

logger = logging.getLogger(__name__)

SMALL_PIXELS = 3 * 128 * 128
"""Numbers in a request's pictures up to which a thread of its own costs more than encoding them."""


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
        gc.freeze()  # models and programs stay: nothing to look through at every collection

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

        Cancelling this coroutine, or one picture's failure, cancels its pictures at the next call.

        Raises:
            InvalidRequestError, APIError: the request's mistake.
            OverloadedError: the queue is full, or the latency budget cannot be kept.
            GenerationError: a picture failed.
            TimeoutError: not done within `request_timeout_s`.
        """
        started_s = time.monotonic()
        return await self._finish(request, self._submit(request, None), started_s)

    async def stream(self, request: ImageRequest) -> AsyncIterator[PartialImage | CompletedImage]:
        """Make one picture and show it on the way.

        What is refused is refused here; what the returned iterator raises comes after the first event.

        Raises:
            As `generate`.
        """
        started_s = time.monotonic()
        loop, previews = asyncio.get_running_loop(), asyncio.Queue[Preview | None]()

        def tell(preview: Preview | None) -> None:
            loop.call_soon_threadsafe(previews.put_nowait, preview)

        futures = self._submit(request, tell)
        futures[0].add_done_callback(lambda _: tell(None))
        return self._events(request, futures, previews, started_s)

    async def _events(
        self,
        request: ImageRequest,
        futures: Sequence[Future[Picture]],
        previews: asyncio.Queue[Preview | None],
        started_s: float,
    ) -> AsyncIterator[PartialImage | CompletedImage]:
        try:
            index = 0
            while (preview := await asyncio.wait_for(previews.get(), self.config.request_timeout_s)) is not None:
                yield await asyncio.to_thread(self._partial_image, preview, index, request)
                index += 1
            answer = await self._finish(request, futures, started_s)
        finally:
            for future in futures:
                future.cancel()
        (image,) = answer.data
        shared = answer.model_dump(exclude={"created", "data"})
        yield CompletedImage(created_at=answer.created, **shared, **image.model_dump())

    def _submit(self, request: ImageRequest, on_preview: Callable[[Preview], None] | None) -> list[Future[Picture]]:
        if self._is_draining:
            raise not_ready("the server is stopping; send the request to another")
        params = request.to_sampling_params(self.model.recipe)
        encoding_ms = 1e3 * len(params) * self.engine.call_seconds(_encoding(request, params[0]))
        return self.engine.submit_all(params, request.to_delivery(self.model.recipe, encoding_ms, on_preview))

    async def _finish(
        self, request: ImageRequest, futures: Sequence[Future[Picture]], started_s: float
    ) -> ImageResponse:
        """Wait for a request's pictures and encode them."""
        try:
            async with asyncio.timeout(self.config.request_timeout_s):
                pictures = await asyncio.gather(*map(asyncio.wrap_future, futures))
        finally:
            for future in futures:
                future.cancel()  # a finished one is not changed by this
        encoding_s = time.monotonic()
        if sum(picture.pixels.size for picture in pictures) <= SMALL_PIXELS:
            images = self._encode(pictures, request)
        else:
            images = await asyncio.to_thread(self._encode, pictures, request)
        ended_s = time.monotonic()
        encode_ms, total_ms = 1e3 * (ended_s - encoding_s), 1e3 * (ended_s - started_s)
        self.engine.observe(_encoding(request, pictures[0].params), 1, (ended_s - encoding_s) / len(pictures))
        timings = self._timings(pictures, encode_ms, total_ms)
        self.metrics.observe_request(timings)
        for picture in pictures:
            self.metrics.steps_used.labels(picture.params.num_inference_steps).inc()
        budget_ms = request.latency_budget_ms
        return ImageResponse(
            created=int(time.time()),
            data=images,
            model=self.model.recipe.name,
            output_format=request.output_format,
            size=f"{pictures[0].params.width}x{pictures[0].params.height}",
            usage=self._usage(pictures),
            timings=timings,
            predicted_ms=max(picture.predicted_ms for picture in pictures) + encode_ms,
            latency_budget_kept=None if budget_ms is None else total_ms <= budget_ms,
            warnings=_warnings(pictures[0].prompt),
        )

    def _encode(self, pictures: Sequence[Picture], request: ImageRequest) -> list[GeneratedImage]:
        images = []
        for picture in pictures:
            params = picture.params
            receipt = receipt_of(self.model, params, picture.pixels, picture.is_strict)
            embedded: dict[str, str] = {}
            if request.metadata:
                text = describe_parameters(params, self.model.recipe, self.model.digest)
                embedded = {"parameters": text, "receipt": receipt.to_json()}
            encoded = encode_image(
                picture.pixels, request.output_format, compression=request.output_compression, **embedded
            )
            images.append(
                GeneratedImage(
                    b64_json=base64.b64encode(encoded).decode("ascii"),
                    seed=params.seed,
                    num_inference_steps=params.num_inference_steps,
                    is_cached=picture.is_cached,
                    receipt=receipt,
                )
            )
        return images

    def _partial_image(self, preview: Preview, index: int, request: ImageRequest) -> PartialImage:
        encoded = encode_image(preview.pixels, request.output_format, compression=request.output_compression)
        return PartialImage(
            b64_json=base64.b64encode(encoded).decode("ascii"),
            partial_image_index=index,
            created_at=int(time.time()),
            size=f"{preview.params.width}x{preview.params.height}",
            output_format=request.output_format,
            is_draft=preview.is_draft,
            num_steps_taken=preview.num_steps_taken,
        )

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


def _encoding(request: ImageRequest, params: SamplingParams) -> Kind:
    """What the engine calls the encoding of a file of this format and size."""
    return Kind(f"encode:{request.output_format}", (params.height, params.width))


def _warnings(prompt: PromptEmbedding) -> list[str]:
    if not prompt.is_truncated:
        return []
    return [f"the prompt has {prompt.num_tokens} tokens; the model read the first {prompt.max_tokens}"]


def check_static_files(folder: Path) -> None:
    """Fail at start where the playground's files are missing."""
    if missing := [name for name in ("index.html", "playground.js", "playground.css") if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}; reinstall the package")
