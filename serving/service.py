"""Makes pictures for the fronts: an engine, a codec, metrics. Knows nothing of HTTP, gRPC or Ray."""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import get_args

import torch

from serving.answers import ImageAnswer, PartialAnswer
from serving.arrival import since_arrival_s
from serving.assembly import encoding_kind, to_images, to_partial, to_timings, to_usage, to_warnings
from serving.catalog import Catalog, Served, load_base
from serving.config import ServerConfig
from serving.metrics import ServerMetrics
from serving.safety import Safety
from serving.schema.images import ImageRequest
from serving.schema.models import ModelCard
from serving.tracing import current_span
from tdm_runtime.codec import ImageFormat, describe_parameters, encode_image
from tdm_runtime.cost_model import Kind
from tdm_runtime.delivery import Delivery, Preview
from tdm_runtime.engine import DiffusionEngine
from tdm_runtime.loaded_model import LoadedModel
from tdm_runtime.params import SamplingParams
from tdm_runtime.receipt import receipt_of
from tdm_runtime.recipe import Recipe
from tdm_runtime.sample import Picture
from tdm_runtime.warm_up import PROMPT

logger = logging.getLogger(__name__)

SWITCH_S = 1e-4
"""How long a thread may keep the interpreter from others, in place of Python's 5 ms. The engine's gives it up for every
operation on tensors, and is to have it back at once, however busy the event loop is."""
HAND_OVER = Kind("hand-over")
"""From the engine's thread to the event loop, which has others to answer as well."""
CALM_CALLS = 3
"""Measured calls of a kind before the first request."""
SMALL_PIXELS = 3 * 128 * 128
"""Numbers in a request's pictures up to which a thread of its own costs more than encoding them."""


@dataclass(frozen=True)
class Submitted:
    """A request on its way."""

    request: ImageRequest
    model: LoadedModel
    futures: Sequence[Future[Picture]]
    arrived_s: float
    """Monotonic, as the next."""
    submitted_s: float
    is_background: bool
    """Nobody waits for it."""

    def cancel(self) -> None:
        """Stop what is not finished at the next call."""
        for future in self.futures:
            future.cancel()


class ImageService:
    """The models and the engine that they share."""

    def __init__(self, config: ServerConfig, metrics: ServerMetrics) -> None:
        self.config = config
        self.metrics = metrics
        sys.setswitchinterval(SWITCH_S)
        torch.set_num_threads(1)  # of this thread: only the engine's may have more, see loaded_model
        self._safety = Safety.load(config)
        bases = [load_base(source, config.backend) for source in config.models]
        self.engine = DiffusionEngine(bases[0].model, config.engine, metrics.observe_batch)
        self.engine.start()
        try:
            self.catalog = Catalog(self.engine, bases, config)
            for base in bases:
                self._learn_calm_costs(base.model)
        except BaseException:
            self.engine.close()
            raise
        metrics.watch_engine(self.engine, lambda: [served.model for served in self.catalog.served()])
        gc.freeze()  # models and programs stay: nothing to look through at every collection

    def _learn_calm_costs(self, model: LoadedModel) -> None:
        """Measure what is not the engine's before the first request, as they fade to what was measured first."""
        for width, height in model.recipe.native_sizes:
            params = SamplingParams(PROMPT, 0, model.recipe.step_counts[0], width, height)
            picture = self.engine.submit(params, model=model).result()
            for output_format in get_args(ImageFormat):
                request = ImageRequest.model_validate({"prompt": PROMPT, "output_format": output_format})
                encode = partial(to_images, model, [picture], request, False)
                self.engine.observe(encoding_kind(request, params), 1, _least_seconds(encode))
        self.engine.observe(HAND_OVER, 1, _least_seconds(partial(self.engine.run_on_thread, lambda: None)))

    @property
    def is_healthy(self) -> bool:
        """Whether the engine runs."""
        return self.engine.is_healthy

    @property
    def backend(self) -> str:
        """What runs the default model and, where it was measured, why."""
        return self.engine.model.choice or self.engine.model.backend

    @property
    def num_live(self) -> int:
        """Pictures accepted and not yet answered."""
        return self.engine.num_live

    def close(self) -> None:
        """Finish what was accepted, then stop."""
        self.catalog.close()
        self.engine.close()

    def models(self) -> list[ModelCard]:
        """What is served."""
        return [_card(served) for served in self.catalog.served()]

    def model_card(self, name: str | None) -> ModelCard:
        """Describe one model; None is the default.

        Raises:
            APIError: 404, there is none of that name.
        """
        return _card(self.catalog.find(name))

    def recipe(self, name: str | None) -> Recipe:
        """How a model is sampled; None is the default.

        Raises:
            APIError: 404, there is none of that name.
        """
        return self.catalog.find(name).model.recipe

    async def render(self, params: SamplingParams, model: str | None) -> bytes:
        """Make one picture in the time that others leave. Cancelling this coroutine cancels it at the next call.

        Args:
            model: its name; None is the default.

        Returns:
            A PNG with its parameters and its receipt.

        Raises:
            APIError: 404, there is no such model; 400, it is not to be made.
            OverloadedError: the queue is full.
            GenerationError: the picture failed.
        """
        self._safety.check_prompt(params.prompt)
        loaded = self.catalog.find(model).model
        future = self.engine.submit(params, Delivery(is_background=True), loaded)
        picture = await asyncio.wrap_future(future)
        return await asyncio.to_thread(self._to_png, loaded, picture)

    def _to_png(self, model: LoadedModel, picture: Picture) -> bytes:
        self._safety.check_picture(picture.pixels)
        receipt = receipt_of(model, picture.params, picture.pixels, picture.is_strict).to_json()
        text = describe_parameters(picture.params, model.recipe, model.digest)
        return encode_image(picture.pixels, "png", parameters=text, receipt=receipt)

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
        return await self._finish(self._submit(request, None, is_background), as_pixels)

    async def stream(self, request: ImageRequest) -> AsyncIterator[PartialAnswer | ImageAnswer]:
        """Make one picture and show it on the way.

        What is refused is refused here; what the returned iterator raises comes after the first event.

        Raises:
            As `generate`.
        """
        loop, previews = asyncio.get_running_loop(), asyncio.Queue[Preview | None]()

        def tell(preview: Preview | None) -> None:
            loop.call_soon_threadsafe(previews.put_nowait, preview)

        submitted = self._submit(request, tell)
        submitted.futures[0].add_done_callback(lambda _: tell(None))
        return self._events(submitted, previews)

    async def _events(
        self, submitted: Submitted, previews: asyncio.Queue[Preview | None]
    ) -> AsyncIterator[PartialAnswer | ImageAnswer]:
        try:
            index = 0
            while (preview := await asyncio.wait_for(previews.get(), self.config.request_timeout_s)) is not None:
                yield await asyncio.to_thread(self._partial, preview, index, submitted.request)
                index += 1
            yield await self._finish(submitted)
        finally:
            submitted.cancel()

    def _submit(
        self, request: ImageRequest, on_preview: Callable[[Preview], None] | None, is_background: bool = False
    ) -> Submitted:
        self._safety.check_prompt(request.prompt)
        model = self.catalog.find(request.model).model
        params = request.to_sampling_params(model.recipe)
        _trace(model, params)
        encoding_ms = 1e3 * len(params) * self.engine.call_seconds(encoding_kind(request, params[0]))
        waited_s = since_arrival_s()
        delivery = replace(
            request.to_delivery(model.recipe, encoding_ms, on_preview),
            elapsed_ms=1e3 * waited_s,
            hand_over_ms=1e3 * self.engine.call_seconds(HAND_OVER),
            is_background=is_background,
        )
        now_s = time.monotonic()
        futures = self.engine.submit_all(params, delivery, model)
        submitted = Submitted(request, model, futures, now_s - waited_s, now_s, is_background)
        if request.latency_budget_ms is not None:
            self.metrics.budgets_promised.inc()
        return submitted

    def _partial(self, preview: Preview, index: int, request: ImageRequest) -> PartialAnswer:
        self._safety.check_picture(preview.pixels)
        return to_partial(preview, index, request)

    async def _finish(self, submitted: Submitted, as_pixels: bool = False) -> ImageAnswer:
        """Wait for a request's pictures and encode them."""
        request, model = submitted.request, submitted.model
        try:
            async with asyncio.timeout(None if submitted.is_background else self.config.request_timeout_s):
                pictures = await asyncio.gather(*map(asyncio.wrap_future, submitted.futures))
        except Exception:
            if request.latency_budget_ms is not None:
                self.metrics.budgets_missed.inc()
            raise
        finally:
            submitted.cancel()  # a finished one is not changed by this
        handed_s = time.monotonic()
        made_s = submitted.submitted_s + 1e-3 * max(picture.timings.total_ms for picture in pictures)
        self.engine.observe(HAND_OVER, 1, max(0.0, handed_s - made_s))
        if self._safety.is_on:
            for picture in pictures:
                await asyncio.to_thread(self._safety.check_picture, picture.pixels)
        encoding_s = time.monotonic()
        if sum(picture.pixels.size for picture in pictures) <= SMALL_PIXELS:
            images = to_images(model, pictures, request, as_pixels)
        else:
            images = await asyncio.to_thread(to_images, model, pictures, request, as_pixels)
        ended_s = time.monotonic()
        encode_ms, total_ms = 1e3 * (ended_s - encoding_s), 1e3 * (ended_s - submitted.arrived_s)
        if not as_pixels:
            self.engine.observe(encoding_kind(request, pictures[0].params), 1, (ended_s - encoding_s) / len(pictures))
        slowest = max((picture.timings for picture in pictures), key=lambda t: t.queue_ms + sum(t.steps_ms))
        waited_ms = 1e3 * (submitted.submitted_s - submitted.arrived_s)
        timings = to_timings(slowest, waited_ms, encode_ms, total_ms)
        budget_ms = request.latency_budget_ms
        budget_kept = None if budget_ms is None else total_ms <= budget_ms
        if not submitted.is_background:
            self.metrics.observe_request(timings, budget_kept)
        if (span := current_span()) is not None:
            span.record_stages(slowest, encode_ms, total_ms)
            _trace(model, [picture.params for picture in pictures])
        for picture in pictures:
            self.metrics.steps_used.labels(picture.params.num_inference_steps).inc()
        return ImageAnswer(
            created=int(time.time()),
            model=model.name,
            images=images,
            output_format=request.output_format,
            width=pictures[0].params.width,
            height=pictures[0].params.height,
            usage=to_usage(model, pictures),
            timings=timings,
            predicted_ms=max(picture.predicted_ms for picture in pictures) + waited_ms + encode_ms,
            latency_budget_kept=budget_kept,
            warnings=to_warnings(pictures[0].prompt),
        )


def _least_seconds(call: Callable[[], object]) -> float:
    """The quickest of a few calls after a first one, which may have more to do."""
    times_s = []
    for _ in range(CALM_CALLS + 1):
        began_s = time.monotonic()
        call()
        times_s.append(time.monotonic() - began_s)
    return min(times_s[1:])


def _card(served: Served) -> ModelCard:
    model, recipe = served.model, served.model.recipe
    return ModelCard(
        id=model.name,
        created=served.created,
        sizes=[f"{width}x{height}" for width, height in recipe.native_sizes],
        step_counts=list(recipe.step_counts),
        default_steps=recipe.default_steps,
        decoders=list(model.decoders),
        backend=model.backend,
        parity_psnr_db={steps: round(found.psnr_db, 1) for steps, found in model.parity.items()},
        digest=model.digest,
        base=model.base,
    )


def _trace(model: LoadedModel, params: Sequence[SamplingParams]) -> None:
    """Say what is made, where somebody traces it."""
    if (span := current_span()) is None:
        return
    span.set(
        {
            "tdm.model": model.name,
            "tdm.backend": model.backend,
            "tdm.num_inference_steps": max(one.num_inference_steps for one in params),
            "tdm.size": f"{params[0].width}x{params[0].height}",
            "tdm.n": len(params),
        }
    )
