"""What the fronts and the jobs know of whoever makes pictures."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from serving.schema.answers import ImageAnswer, PartialAnswer
from serving.schema.image_request import ImageRequest
from serving.schema.models import ModelCard
from tdm_runtime.checkpoint.recipe import Recipe
from tdm_runtime.params import SamplingParams


class Images(Protocol):
    """What makes pictures: engines here (`ImageService`) or elsewhere (`RemoteImages`)."""

    @property
    def is_healthy(self) -> bool: ...
    @property
    def num_live(self) -> int: ...
    def models(self) -> list[ModelCard]: ...
    def model_card(self, name: str | None) -> ModelCard: ...
    def recipe(self, name: str | None) -> Recipe: ...
    async def render(self, params: SamplingParams, model: str | None) -> bytes: ...
    async def generate(
        self, request: ImageRequest, as_pixels: bool = False, is_background: bool = False
    ) -> ImageAnswer: ...
    async def stream(self, request: ImageRequest) -> AsyncIterator[PartialAnswer | ImageAnswer]: ...
    def close(self) -> None: ...
