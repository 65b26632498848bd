"""Makes pictures with an engine in this process. Imports neither HTTP, gRPC nor Ray."""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import get_args

import numpy as np
import torch

from serving.arrival import since_arrival_s
from serving.config import ServerConfig
from serving.images.accounting import account, accounted
from serving.images.assembly import encoding_kind, to_images, to_partial, to_timings, to_usage, to_warnings
from serving.images.catalog import Catalog, Served, load_base
from serving.images.thread_watch import ThreadWatch
from serving.schema.answers import ImageAnswer, PartialAnswer
from serving.schema.models import ModelCard
from serving.schema.order import ImageEncoding, ImageOrder
from serving.telemetry.metrics import CALLS, ENCODING, ServerMetrics
from tdm_runtime.checkpoint.recipe import Recipe
from tdm_runtime.checkpoint.stock.text_precision import TextPool
from tdm_runtime.engine.delivery import Delivery, Preview
from tdm_runtime.engine.engine import DiffusionEngine
from tdm_runtime.engine.sample import Picture
from tdm_runtime.engine.warm_up import PROMPT
from tdm_runtime.media.image_file import ImageFormat
from tdm_runtime.media.made_file import frames_of
from tdm_runtime.media.provenance import Provenance
from tdm_runtime.media.video_file import encode_frames
from tdm_runtime.model.choice import least_seconds
from tdm_runtime.model.decoder import Pixels
from tdm_runtime.model.loaded_model import LoadedModel
from tdm_runtime.params import SamplingParams
from tdm_runtime.safety import Safety
from tdm_runtime.scheduling.cost_model import Kind

logger = logging.getLogger(__name__)

SWITCH_S = 1e-4
"""Longest time that a thread keeps the interpreter while others want it, in seconds; Python's default is 5 ms. The
engine's thread gives it up at every operation on tensors and must soon get it back, even beside a busy event loop."""
HAND_OVER = Kind("hand-over")
"""Time from the engine's thread to the event loop, which may be busy with other requests."""
CALM_CALLS = 3
"""Calls of a kind that are measured before the first request."""
SMALL_PIXELS = 3 * 128 * 128
"""Most numbers in a request's pictures that are encoded on the event loop; for them a thread would take longer."""


@dataclass(frozen=True)
class Submitted:
    """A request that the engine has accepted."""

    order: ImageOrder
    model: LoadedModel
    futures: Sequence[Future[Picture]]
    delivery: Delivery
    """What the engine was told, with the parts of the latency budget that are not its own."""
    arrived_s: float
    """Time of arrival, monotonic."""
    submitted_s: float
    """Time of submission to the engine, monotonic."""

    def cancel(self) -> None:
        """Stop unfinished pictures at the next call."""
        for future in self.futures:
            future.cancel()


class ImageService:
    """All models, and the engine that they share."""

    def __init__(self, config: ServerConfig, metrics: ServerMetrics) -> None:
        self.config = config
        self.metrics = metrics
        sys.setswitchinterval(SWITCH_S)
        torch.set_num_threads(1)  # of this thread; only the engine's may have more, see loaded_model
        self._safety = Safety.load(config.blocked_words, config.safety_checker)
        self._provenance = Provenance(config.provenance)
        texts = TextPool()
        bases = [load_base(source, config, texts) for source in config.models]
        self.engine = DiffusionEngine(bases[0].model, config.engine, metrics.observe_batch)
        self.engine.start()
        try:
            self.catalog = Catalog(self.engine, bases, config)
            for base in bases:
                self._learn_calm_costs(base.model)
        except BaseException:
            self.engine.close()
            raise
        self._watch = ThreadWatch(self.engine, [base.checkpoint for base in bases], config.backend)
        metrics.watch_engine(self.engine, lambda: [served.model for served in self.catalog.served()])
        gc.freeze()  # models and programs live as long as the process; collections need not look through them

    def _learn_calm_costs(self, model: LoadedModel) -> None:
        """Measure encoding and hand-over before the first request: what load teaches about them fades to this.

        One picture is made. Those of other sizes are stretched from it, because encoding takes as long. What files of
        clips take is learned from requests.
        """
        hand_over = partial(self.engine.run_on_thread, lambda: None)
        self.engine.observe(HAND_OVER, 1, least_seconds(hand_over, CALM_CALLS))
        if model.recipe.fps is not None:
            encode_frames(np.zeros((1, 16, 16, 3), np.uint8), "mp4", model.recipe.fps)  # loads FFmpeg's libraries
            return
        made: Picture | None = None
        for (width, height), output_format in itertools.product(model.recipe.native_sizes, get_args(ImageFormat)):
            params = SamplingParams(PROMPT, 0, model.recipe.step_counts[0], width, height)
            order = ImageOrder(model.name, (params,), encoding=ImageEncoding(output_format))
            if self.engine.call_seconds(encoding_kind(order)):
                continue  # models share their encoders of files
            made = made or self.engine.submit(params, model=model).result()
            picture = replace(made, params=params, pixels=_stretched(made.pixels, width, height))
            encode = partial(to_images, model, [picture], order.encoding, self._provenance)
            self.engine.observe(encoding_kind(order), 1, least_seconds(encode, CALM_CALLS))

    @property
    def is_healthy(self) -> bool:
        """Whether the engine runs."""
        return self.engine.is_healthy

    @property
    def backend(self) -> str:
        """Backend of the default model and, where backends were measured, why it was chosen."""
        return self.engine.model.choice or self.engine.model.backend

    @property
    def num_live(self) -> int:
        """Number of pictures that were accepted and are not yet answered."""
        return self.engine.num_live

    def close(self) -> None:
        """Finish all accepted pictures, then stop."""
        self._watch.close()
        self.catalog.close()
        self.engine.close()

    def models(self) -> list[ModelCard]:
        """Return the served models, the default first."""
        return [_card(served) for served in self.catalog.served()]

    def model_card(self, name: str | None) -> ModelCard:
        """Describe one model; None is the default model.

        Raises:
            APIError: 404, no model has this name.
        """
        return _card(self.catalog.find(name))

    def recipe(self, name: str | None) -> Recipe:
        """Return the recipe of a model; None is the default model.

        Raises:
            APIError: 404, no model has this name.
        """
        return self.catalog.find(name).model.recipe

    async def generate(self, order: ImageOrder) -> ImageAnswer:
        """Make a request's pictures.

        Cancelling this coroutine, or one picture's failure, cancels its pictures at the next call.

        Raises:
            InvalidRequestError, APIError: the request is at fault.
            OverloadedError: the queue is full, or the latency budget cannot be met.
            GenerationError: a picture failed.
            TimeoutError: not done within `request_timeout_s`; background work has no limit.
        """
        with self._accounted(order):
            return await self._finish(self._submit(order, None))

    async def stream(self, order: ImageOrder) -> AsyncIterator[PartialAnswer | ImageAnswer]:
        """Make one picture and send previews of it.

        A refusal is raised here. Errors that the returned iterator raises come after the stream has begun.

        Raises:
            InvalidRequestError, APIError, OverloadedError: see `generate`.
        """
        loop, previews = asyncio.get_running_loop(), asyncio.Queue[Preview | None]()

        def send(preview: Preview | None) -> None:
            loop.call_soon_threadsafe(previews.put_nowait, preview)

        submitted = self._submit(order, send)
        submitted.futures[0].add_done_callback(lambda _: send(None))
        return self._events(submitted, previews)

    async def _events(
        self, submitted: Submitted, previews: asyncio.Queue[Preview | None]
    ) -> AsyncIterator[PartialAnswer | ImageAnswer]:
        order = submitted.order
        limit_s = None if order.delivery.is_background else self.config.request_timeout_s
        with self._accounted(order):
            try:
                index = 0
                while (preview := await asyncio.wait_for(previews.get(), limit_s)) is not None:
                    yield await asyncio.to_thread(self._partial, preview, index, order)
                    index += 1
                answer = await self._finish(submitted)
            finally:
                submitted.cancel()
        yield answer

    def _accounted(self, order: ImageOrder) -> AbstractContextManager[None]:
        return accounted(order, self.catalog.find(order.model).model.backend, self.metrics)

    def _submit(self, order: ImageOrder, on_preview: Callable[[Preview], None] | None) -> Submitted:
        self._safety.check_prompt(order.pictures[0].prompt)
        model = self.catalog.find(order.model).model
        waited_s = since_arrival_s()
        delivery = self._delivery(order, waited_s, on_preview)
        now_s = time.monotonic()
        futures = self.engine.submit_all(order.pictures, delivery, model)
        return Submitted(order, model, futures, delivery, now_s - waited_s, now_s)

    def _delivery(self, order: ImageOrder, waited_s: float, on_preview: Callable[[Preview], None] | None) -> Delivery:
        """Return the engine's view of an order. Of its latency budget, encoding and hand-over take a part."""
        options, budget_ms = order.delivery, order.delivery.latency_budget_ms
        encoding_ms = 1e3 * len(order.pictures) * self.engine.call_seconds(encoding_kind(order))
        return Delivery(
            latency_budget_ms=budget_ms,
            min_inference_steps=options.min_inference_steps,
            strict=options.strict,
            on_preview=on_preview if options.draft or options.num_previews else None,
            num_previews=options.num_previews,
            draft=options.draft,
            is_background=options.is_background,
            elapsed_ms=1e3 * waited_s,
            hand_over_ms=1e3 * self.engine.call_seconds(HAND_OVER),
            encoding_ms=0.0 if budget_ms is None else encoding_ms,
        )

    def _partial(self, preview: Preview, index: int, order: ImageOrder) -> PartialAnswer:
        for pixels in frames_of(preview.params, preview.pixels):
            self._safety.check_picture(pixels)
        return to_partial(preview, index, order.encoding, self._provenance)

    async def _finish(self, submitted: Submitted) -> ImageAnswer:
        """Wait for the pictures of a request and encode them."""
        order, model = submitted.order, submitted.model
        budget_ms, is_background = order.delivery.latency_budget_ms, order.delivery.is_background
        try:
            async with asyncio.timeout(None if is_background else self.config.request_timeout_s):
                pictures = await asyncio.gather(*map(asyncio.wrap_future, submitted.futures))
        finally:
            submitted.cancel()  # no effect on finished pictures
        handed_s = time.monotonic()
        made_s = submitted.submitted_s + 1e-3 * max(picture.timings.total_ms for picture in pictures)
        self.engine.observe(HAND_OVER, 1, max(0.0, handed_s - made_s))
        if self._safety.is_on:
            for picture in pictures:
                for pixels in frames_of(picture.params, picture.pixels):
                    await asyncio.to_thread(self._safety.check_picture, pixels)
        encoding_s = time.monotonic()
        if sum(picture.pixels.size for picture in pictures) <= SMALL_PIXELS:
            images = to_images(model, pictures, order.encoding, self._provenance)
        else:
            images = await asyncio.to_thread(to_images, model, pictures, order.encoding, self._provenance)
        ended_s = time.monotonic()
        encode_ms, total_ms = 1e3 * (ended_s - encoding_s), 1e3 * (ended_s - submitted.arrived_s)
        if not order.encoding.pixels_only:
            self.engine.observe(encoding_kind(order), 1, (ended_s - encoding_s) / len(pictures))
        slowest = max((picture.timings for picture in pictures), key=lambda t: t.queue_ms + sum(t.steps_ms))
        waited_ms = 1e3 * (submitted.submitted_s - submitted.arrived_s)
        timings = to_timings(slowest, waited_ms, encode_ms, total_ms)
        late = late_by(submitted.delivery, 1e3 * (made_s - submitted.submitted_s), 1e3 * (handed_s - made_s), total_ms)
        width, height, file_format = pictures[0].params.width, pictures[0].params.height, order.encoding.output_format
        lacking = self._provenance.warnings(width, height, file_format)
        answer = ImageAnswer(
            created=int(time.time()),
            model=model.name,
            images=images,
            output_format=file_format,
            width=width,
            height=height,
            usage=to_usage(model, pictures),
            timings=timings,
            waits_ms=slowest.waits_ms,
            predicted_ms=max(picture.predicted_ms for picture in pictures) + waited_ms + encode_ms,
            latency_budget_kept=None if budget_ms is None else late is None,
            late_by=late,
            warnings=[*order.warnings, *to_warnings(pictures[0].prompt), *lacking],
        )
        account(order, answer, self.metrics)
        return answer


def late_by(delivery: Delivery, calls_ms: float, hand_over_ms: float, total_ms: float) -> str | None:
    """Return what made an answer late: the part that took the most beyond its share of the budget. None: in time.

    Args:
        calls_ms: from submission to pixels.
        hand_over_ms: from pixels to the event loop.
        total_ms: from arrival to the encoded answer.
    """
    budget_ms = delivery.latency_budget_ms
    if budget_ms is None or total_ms <= budget_ms:
        return None
    beyond_ms = {
        CALLS: calls_ms - (budget_ms - delivery.elapsed_ms - delivery.hand_over_ms - delivery.encoding_ms),
        HAND_OVER.stage: hand_over_ms - delivery.hand_over_ms,
        ENCODING: total_ms - delivery.elapsed_ms - calls_ms - hand_over_ms - delivery.encoding_ms,
    }
    return max(beyond_ms, key=lambda cause: beyond_ms[cause])


def _stretched(pixels: Pixels, width: int, height: int) -> Pixels:
    """Return a picture in another size, each pixel the nearest one."""
    rows, columns = (np.arange(side) * old // side for side, old in zip((height, width), pixels.shape, strict=False))
    stretched: Pixels = pixels[rows[:, None], columns]
    return stretched


def _card(served: Served) -> ModelCard:
    model, recipe = served.model, served.model.recipe
    return ModelCard(
        id=model.name,
        created=served.created,
        family=model.family.name,
        recipe=model.recipe_source,
        sizes=[f"{width}x{height}" for width, height in recipe.native_sizes],
        size_rule=recipe.size_rule,
        frames=recipe.frames,
        fps=recipe.fps,
        step_counts=list(recipe.step_counts),
        default_steps=recipe.default_steps,
        decoders=list(model.decoders),
        guidance_scale=recipe.guidance_scale,
        lora_scale=recipe.lora_scale,
        max_references=recipe.references.max_pictures if recipe.references and model.reads_references else 0,
        backend=model.backend,
        parity_psnr_db={steps: round(found.psnr_db, 1) for steps, found in model.parity.items()},
        digest=model.digest,
        base=model.base,
    )
