"""Makes pictures for the fronts: an engine, a codec, metrics. Knows nothing of HTTP, gRPC or Ray."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace

import torch

from serving.answers import ImageAnswer, ImageTimings, InputTokenDetails, MadeImage, PartialAnswer, Usage
from serving.config import ServerConfig
from serving.errors import invalid
from serving.metrics import ServerMetrics
from serving.schema.images import ImageRequest
from serving.schema.models import ModelCard
from tdm_runtime.backend_choice import load_model
from tdm_runtime.codec import describe_parameters, encode_image
from tdm_runtime.cost_model import Kind
from tdm_runtime.decoder import Pixels
from tdm_runtime.delivery import Delivery, Preview
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

    def __init__(self, config: ServerConfig, metrics: ServerMetrics) -> None:
        self.config = config
        self.metrics = metrics
        torch.set_num_threads(1)  # of this thread: only the engine's may have more, see loaded_model
        self.model: LoadedModel = load_model(config.checkpoint, config.backend)
        logger.info("%s runs on %s", self.model.recipe.name, self.model.choice or self.model.backend)
        self.engine = DiffusionEngine(self.model, config.engine, self.metrics.observe_batch)
        self.metrics.watch(self.engine)
        self._created = int((config.checkpoint / RECIPE_FILE).stat().st_mtime)
        self.engine.start()
        warm_up(self.engine)
        gc.freeze()  # models and programs stay: nothing to look through at every collection

    @property
    def is_healthy(self) -> bool:
        """Whether the engine runs."""
        return self.engine.is_healthy

    @property
    def num_live(self) -> int:
        """Pictures accepted and not yet answered."""
        return self.engine.num_live

    def close(self) -> None:
        """Finish what was accepted, then stop."""
        self.engine.close()

    def models(self) -> list[ModelCard]:
        """What is served."""
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
        return [card]

    def model_card(self, name: str) -> ModelCard:
        """Describe one model.

        Raises:
            APIError: 404, there is none of that name.
        """
        for card in self.models():
            if card.id == name:
                return card
        known = ", ".join(card.id for card in self.models())
        raise invalid(f"model {name[:64]!r} does not exist; this server has {known}", "model", "model_not_found", 404)

    def cost(self, request: ImageRequest) -> float:
        """What a request takes of a quota, in megapixel-steps; the most it may take where steps are open.

        Raises:
            InvalidRequestError, APIError: the request's mistake.
        """
        params = request.to_sampling_params(self.model.recipe)[0]
        return request.n * params.width * params.height * params.num_inference_steps / 1e6

    async def render(self, params: SamplingParams) -> Picture:
        """Make one picture in the time that others leave. Cancelling this coroutine cancels it at the next call.

        Raises:
            OverloadedError: the queue is full.
            GenerationError: the picture failed.
        """
        return await asyncio.wrap_future(self.engine.submit(params, Delivery(is_background=True)))

    async def generate(
        self, request: ImageRequest, as_pixels: bool = False, is_background: bool = False
    ) -> ImageAnswer:
        """Make a request's pictures.

        Cancelling this coroutine, or one picture's failure, cancels its pictures at the next call.

        Args:
            as_pixels: give bare pixels in place of files.
            is_background: in the time that others leave, however long that takes.

        Raises:
            InvalidRequestError, APIError: the request's mistake.
            OverloadedError: the queue is full, or the latency budget cannot be kept.
            GenerationError: a picture failed.
            TimeoutError: not done within `request_timeout_s`.
        """
        started_s = time.monotonic()
        return await self._finish(
            request, self._submit(request, None, is_background), started_s, as_pixels, is_background
        )

    async def stream(self, request: ImageRequest) -> AsyncIterator[PartialAnswer | ImageAnswer]:
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
    ) -> AsyncIterator[PartialAnswer | ImageAnswer]:
        try:
            index = 0
            while (preview := await asyncio.wait_for(previews.get(), self.config.request_timeout_s)) is not None:
                yield await asyncio.to_thread(self._partial, preview, index, request)
                index += 1
            yield await self._finish(request, futures, started_s)
        finally:
            for future in futures:
                future.cancel()

    def _submit(
        self, request: ImageRequest, on_preview: Callable[[Preview], None] | None, is_background: bool = False
    ) -> list[Future[Picture]]:
        params = request.to_sampling_params(self.model.recipe)
        encoding_ms = 1e3 * len(params) * self.engine.call_seconds(_encoding(request, params[0]))
        delivery = request.to_delivery(self.model.recipe, encoding_ms, on_preview)
        return self.engine.submit_all(params, replace(delivery, is_background=is_background))

    async def _finish(
        self,
        request: ImageRequest,
        futures: Sequence[Future[Picture]],
        started_s: float,
        as_pixels: bool = False,
        is_background: bool = False,
    ) -> ImageAnswer:
        """Wait for a request's pictures and encode them."""
        try:
            async with asyncio.timeout(None if is_background else self.config.request_timeout_s):
                pictures = await asyncio.gather(*map(asyncio.wrap_future, futures))
        finally:
            for future in futures:
                future.cancel()  # a finished one is not changed by this
        encoding_s = time.monotonic()
        if sum(picture.pixels.size for picture in pictures) <= SMALL_PIXELS:
            images = self._encode(pictures, request, as_pixels)
        else:
            images = await asyncio.to_thread(self._encode, pictures, request, as_pixels)
        ended_s = time.monotonic()
        encode_ms, total_ms = 1e3 * (ended_s - encoding_s), 1e3 * (ended_s - started_s)
        if not as_pixels:
            self.engine.observe(_encoding(request, pictures[0].params), 1, (ended_s - encoding_s) / len(pictures))
        timings = self._timings(pictures, encode_ms, total_ms)
        if not is_background:
            self.metrics.observe_request(timings)
        for picture in pictures:
            self.metrics.steps_used.labels(picture.params.num_inference_steps).inc()
        budget_ms = request.latency_budget_ms
        return ImageAnswer(
            created=int(time.time()),
            model=self.model.recipe.name,
            images=images,
            output_format=request.output_format,
            width=pictures[0].params.width,
            height=pictures[0].params.height,
            usage=self._usage(pictures),
            timings=timings,
            predicted_ms=max(picture.predicted_ms for picture in pictures) + encode_ms,
            latency_budget_kept=None if budget_ms is None else total_ms <= budget_ms,
            warnings=_warnings(pictures[0].prompt),
        )

    def _encode(self, pictures: Sequence[Picture], request: ImageRequest, as_pixels: bool) -> list[MadeImage]:
        images = []
        for picture in pictures:
            params = picture.params
            receipt = receipt_of(self.model, params, picture.pixels, picture.is_strict)
            embedded: dict[str, str] = {}
            if request.metadata and not as_pixels:
                text = describe_parameters(params, self.model.recipe, self.model.digest)
                embedded = {"parameters": text, "receipt": receipt.to_json()}
            content = picture.pixels.tobytes() if as_pixels else _encoded(picture.pixels, request, embedded)
            images.append(MadeImage(content, params.seed, params.num_inference_steps, picture.is_cached, receipt))
        return images

    def _partial(self, preview: Preview, index: int, request: ImageRequest) -> PartialAnswer:
        return PartialAnswer(
            content=_encoded(preview.pixels, request, {}),
            index=index,
            created=int(time.time()),
            output_format=request.output_format,
            width=preview.params.width,
            height=preview.params.height,
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


def _encoded(pixels: Pixels, request: ImageRequest, embedded: Mapping[str, str]) -> bytes:
    return encode_image(pixels, request.output_format, compression=request.output_compression, **embedded)


def _encoding(request: ImageRequest, params: SamplingParams) -> Kind:
    """What the engine calls the encoding of a file of this format and size."""
    return Kind(f"encode:{request.output_format}", (params.height, params.width))


def _warnings(prompt: PromptEmbedding) -> list[str]:
    if not prompt.is_truncated:
        return []
    return [f"the prompt has {prompt.num_tokens} tokens; the model read the first {prompt.max_tokens}"]
