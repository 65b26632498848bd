"""Makes pictures with engines in other processes, on this machine or others.

When an engine dies, its orders are sent once more, to another engine. An order has its seeds, so the second engine
makes the same pictures. A refusal is an answer and is not sent again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from ray.exceptions import RayError, TaskCancelledError
from ray.serve.handle import DeploymentHandle

from serving.arrival import since_arrival_s
from serving.errors import APIError, from_exception, not_ready, unknown_model
from serving.images.accounting import account, accounted
from serving.schema.answers import ImageAnswer, PartialAnswer
from serving.schema.models import ModelCard
from serving.schema.order import ImageOrder
from serving.telemetry.metrics import ServerMetrics
from tdm_runtime.checkpoint.recipe import Recipe

logger = logging.getLogger(__name__)

LOOK_AGAIN_S = 1.0
"""Seconds between two requests for the list of served models."""
UNSEEN_AFTER_S = 10.0
"""Seconds without an answer from any engine after which the server is not ready."""
TRIES = 2
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Listing:
    """Models that an engine serves."""

    cards: list[ModelCard]
    """One card a model, the default first."""
    recipes: Mapping[str, Recipe]
    """Model -> its recipe, against which the schema checks requests."""
    backend: str
    """Backend of the default model and, where backends were measured, why it was chosen."""


class RemoteImages:
    """Sends orders to the engines of other processes."""

    def __init__(self, engines: DeploymentHandle[Any], listing: Listing, metrics: ServerMetrics) -> None:
        self._engines = engines
        self._listing = listing
        self._metrics = metrics
        self._seen_s = time.monotonic()
        self._num_live = 0
        self._looking = asyncio.create_task(self._look_again())

    @classmethod
    async def connect(cls, engines: DeploymentHandle[Any], metrics: ServerMetrics) -> RemoteImages:
        """Wait for the first engine and return its client."""
        return cls(engines, await engines.listing.remote(), metrics)

    @property
    def is_healthy(self) -> bool:
        """Whether an engine has answered recently."""
        return time.monotonic() - self._seen_s < UNSEEN_AFTER_S

    @property
    def backend(self) -> str:
        """Backend of the default model and, where backends were measured, why it was chosen."""
        return self._listing.backend

    @property
    def num_live(self) -> int:
        """Number of pictures that were sent to engines and are not yet answered."""
        return self._num_live

    def close(self) -> None:
        """Stop asking, from any thread; Ray closes the engines."""
        self._looking.get_loop().call_soon_threadsafe(self._looking.cancel)

    def models(self) -> list[ModelCard]:
        """Return the served models, the default first."""
        return self._listing.cards

    def model_card(self, name: str | None) -> ModelCard:
        """See `ImageService.model_card`."""
        cards = self._listing.cards
        found = cards[0] if name is None else next((card for card in cards if card.id == name), None)
        if found is None:
            raise unknown_model(name or "", (card.id for card in cards))
        return found

    def recipe(self, name: str | None) -> Recipe:
        """See `ImageService.recipe`."""
        return self._listing.recipes[self.model_card(name).id]

    async def generate(self, order: ImageOrder) -> ImageAnswer:
        """See `ImageService.generate`."""
        with self._counted(order):
            answer = await self._tried_twice(order)
        account(order, answer, self._metrics)
        return answer

    async def stream(self, order: ImageOrder) -> AsyncIterator[PartialAnswer | ImageAnswer]:
        """See `ImageService.stream`. It awaits the first part, so that a refusal is raised here too."""
        parts = self._parts(order)
        first = await anext(parts)

        async def all_parts() -> AsyncIterator[PartialAnswer | ImageAnswer]:
            yield first
            async for part in parts:
                yield part

        return all_parts()

    async def _parts(self, order: ImageOrder) -> AsyncIterator[PartialAnswer | ImageAnswer]:
        num_sent = 0
        engines = self._engines.options(stream=True)
        with self._counted(order):
            for attempt in range(TRIES):
                num_skipped = num_sent  # the second engine starts from the beginning
                try:
                    async for part in engines.stream.remote(order, since_arrival_s()):
                        if num_skipped:
                            num_skipped -= 1
                            continue
                        if isinstance(made := _unwrapped(part), ImageAnswer):
                            account(order, made, self._metrics)
                        yield made
                        num_sent += 1
                    return
                except RayError as error:
                    self._note_loss(error, attempt)

    async def _tried_twice(self, order: ImageOrder) -> ImageAnswer:
        for attempt in range(TRIES):
            try:
                answer: ImageAnswer | APIError = await self._engines.generate.remote(order, since_arrival_s())
                return _unwrapped(answer)
            except RayError as error:
                self._note_loss(error, attempt)
        raise AssertionError("the last loss raises an error")

    def _note_loss(self, error: RayError, attempt: int) -> None:
        """Record the loss of an engine.

        Raises:
            APIError: 503, the request was sent as often as allowed.
            CancelledError: the client left.
        """
        if isinstance(error, TaskCancelledError):
            raise asyncio.CancelledError from error
        logger.warning("an engine was lost (%s)", type(error).__name__)
        if attempt == TRIES - 1:
            raise not_ready("the engines that worked on this request were lost; send it again") from error
        self._metrics.retried.inc()

    @contextlib.contextmanager
    def _counted(self, order: ImageOrder) -> Iterator[None]:
        self._num_live += len(order.pictures)
        try:
            with accounted(order, self.model_card(order.model).backend, self._metrics):
                yield
        finally:
            self._num_live -= len(order.pictures)

    async def _look_again(self) -> None:
        while True:
            await asyncio.sleep(LOOK_AGAIN_S)
            try:
                self._listing = await asyncio.wait_for(self._engines.listing.remote(), UNSEEN_AFTER_S)
                self._seen_s = time.monotonic()
            except (RayError, TimeoutError) as error:
                logger.warning("no engine lists its models (%s)", type(error).__name__)


def _unwrapped(answer: Answer | APIError) -> Answer:
    if isinstance(answer, APIError):
        raise answer
    return answer


def refusal(error: Exception) -> APIError:
    """Return an error as a value. An exception would look like the loss of the engine."""
    answer = from_exception(error)
    if answer.code == "internal_error":
        logger.error("a request failed", exc_info=error)
    return answer
