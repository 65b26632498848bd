"""The engines of other processes, on this machine or others, as if they were here.

A request whose engine dies is asked once more, of another: its seed is settled before the first time, so the second
makes the same pictures. What an engine refuses is an answer, and is not asked again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from ray.exceptions import RayError, TaskCancelledError
from ray.serve.handle import DeploymentHandle

from serving.errors import APIError, from_exception, not_ready, unknown_model
from serving.fronts.arrival import since_arrival_s
from serving.schema.answers import ImageAnswer, PartialAnswer
from serving.schema.image_request import ImageRequest
from serving.schema.models import ModelCard
from serving.telemetry.metrics import ServerMetrics
from tdm_runtime.checkpoint.recipe import Recipe
from tdm_runtime.params import MAX_SEED, SamplingParams

logger = logging.getLogger(__name__)

LOOK_AGAIN_S = 1.0
"""The engines are asked so often what they serve."""
UNSEEN_AFTER_S = 10.0
"""Nobody answered for so long: not ready."""
TRIES = 2
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Listing:
    """What an engine serves, default first."""

    cards: list[ModelCard]
    recipes: Mapping[str, Recipe]
    """Model -> its recipe: what a request is checked by before it is sent on."""
    backend: str
    """What runs the default and, where it was measured, why."""


class RemoteImages:
    """An `ImageService` whose engines are elsewhere."""

    def __init__(self, engines: DeploymentHandle[Any], listing: Listing, metrics: ServerMetrics) -> None:
        self._engines = engines
        self._listing = listing
        self._metrics = metrics
        self._seen_s = time.monotonic()
        self._num_live = 0
        self._looking = asyncio.create_task(self._look_again())

    @classmethod
    async def connect(cls, engines: DeploymentHandle[Any], metrics: ServerMetrics) -> RemoteImages:
        """Wait for the first engine."""
        return cls(engines, await engines.listing.remote(), metrics)

    @property
    def is_healthy(self) -> bool:
        """Whether some engine answered lately."""
        return time.monotonic() - self._seen_s < UNSEEN_AFTER_S

    @property
    def backend(self) -> str:
        """What runs the default model and, where it was measured, why."""
        return self._listing.backend

    @property
    def num_live(self) -> int:
        """Pictures that were sent on and are not yet answered."""
        return self._num_live

    def close(self) -> None:
        """Ask no more; the engines are closed by Ray."""
        self._looking.cancel()

    def models(self) -> list[ModelCard]:
        """What is served."""
        return self._listing.cards

    def model_card(self, name: str | None) -> ModelCard:
        """As `ImageService.model_card`."""
        cards = self._listing.cards
        found = cards[0] if name is None else next((card for card in cards if card.id == name), None)
        if found is None:
            raise unknown_model(name or "", (card.id for card in cards))
        return found

    def recipe(self, name: str | None) -> Recipe:
        """As `ImageService.recipe`."""
        return self._listing.recipes[self.model_card(name).id]

    async def render(self, params: SamplingParams, model: str | None) -> bytes:
        """As `ImageService.render`."""

        async def ask() -> bytes:
            answer: bytes | APIError = await self._engines.render.remote(params, model)
            return _unwrapped(answer)

        with self._counted(1):
            return await self._tried_twice(ask)

    async def generate(
        self, request: ImageRequest, as_pixels: bool = False, is_background: bool = False
    ) -> ImageAnswer:
        """As `ImageService.generate`."""
        request = self._checked(request)

        async def ask() -> ImageAnswer:
            answer: ImageAnswer | APIError = await self._engines.generate.remote(
                request, as_pixels, is_background, since_arrival_s()
            )
            return _unwrapped(answer)

        with self._counted(request.n):
            answer = await self._tried_twice(ask)
        if is_background:
            return answer
        self._metrics.observe_request(answer.timings, answer.latency_budget_kept)
        for image in answer.images:
            self._metrics.steps_used.labels(image.num_inference_steps).inc()
        return answer

    async def stream(self, request: ImageRequest) -> AsyncIterator[PartialAnswer | ImageAnswer]:
        """As `ImageService.stream`; also what is refused is awaited here, as the first part."""
        request = self._checked(request)
        parts = self._parts(request)
        first = await anext(parts)

        async def all_parts() -> AsyncIterator[PartialAnswer | ImageAnswer]:
            yield first
            async for part in parts:
                yield part

        return all_parts()

    async def _parts(self, request: ImageRequest) -> AsyncIterator[PartialAnswer | ImageAnswer]:
        num_told = 0
        engines = self._engines.options(stream=True)
        with self._counted(request.n):
            for attempt in range(TRIES):
                num_skipped = num_told  # the second engine begins anew; these were told
                try:
                    async for part in engines.stream.remote(request, since_arrival_s()):
                        if num_skipped:
                            num_skipped -= 1
                            continue
                        yield _unwrapped(part)
                        num_told += 1
                    return
                except RayError as error:
                    self._note_loss(error, attempt)

    async def _tried_twice(self, ask: Callable[[], Awaitable[Answer]]) -> Answer:
        for attempt in range(TRIES):
            try:
                return await ask()
            except RayError as error:
                self._note_loss(error, attempt)
        raise AssertionError("the last loss is raised")

    def _note_loss(self, error: RayError, attempt: int) -> None:
        """Count an engine that died; raise where the request is not to be asked again."""
        if isinstance(error, TaskCancelledError):
            raise error
        logger.warning("an engine was lost (%s)", type(error).__name__)
        if attempt == TRIES - 1:
            raise not_ready("the engines that worked on this request were lost; send it again") from error
        self._metrics.retried.inc()

    def _checked(self, request: ImageRequest) -> ImageRequest:
        """The request with its seed settled; what its model refuses is refused before it is sent.

        Raises:
            InvalidRequestError, APIError: the request's mistake.
        """
        request.to_sampling_params(self.recipe(request.model))
        if request.seed is not None:
            return request
        return request.model_copy(update={"seed": secrets.randbelow(MAX_SEED + 1)})

    @contextlib.contextmanager
    def _counted(self, num_pictures: int) -> Iterator[None]:
        self._num_live += num_pictures
        try:
            yield
        finally:
            self._num_live -= num_pictures

    async def _look_again(self) -> None:
        while True:
            await asyncio.sleep(LOOK_AGAIN_S)
            try:
                self._listing = await asyncio.wait_for(self._engines.listing.remote(), UNSEEN_AFTER_S)
                self._seen_s = time.monotonic()
            except (RayError, TimeoutError) as error:
                logger.warning("no engine says what it serves (%s)", type(error).__name__)


def _unwrapped(answer: Answer | APIError) -> Answer:
    if isinstance(answer, APIError):
        raise answer
    return answer


def refusal(error: Exception) -> APIError:
    """What goes back in place of an answer, so that it is not taken for a loss."""
    answer = from_exception(error)
    if answer.code == "internal_error":
        logger.error("a request failed", exc_info=error)
    return answer
