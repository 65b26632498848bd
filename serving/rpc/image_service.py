"""tdm.images.v1.ImageService: pictures, in typed messages with the fields of HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Any

import grpc

from serving.fronts.edge import reading_pictures
from serving.fronts.services import Services
from serving.rpc.calls import made, streamed
from serving.rpc.messages import fields_of, filled, how_made, stream_fields_of, to_image, to_partial, wants_pixels
from serving.rpc.protos import images_pb2 as pb
from serving.schema.answers import ImageAnswer, PartialAnswer
from serving.schema.edit_request import edit_order_from_fields, is_edit
from serving.schema.image_request import order_from_fields
from serving.schema.order import ImageOrder


class ImageServicer:
    """Answers the calls of one replica."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def Generate(self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext) -> pb.GenerateResponse:
        """Make pictures."""
        order = await self._order(fields_of(request))
        if as_pixels := wants_pixels(request):
            order = order.as_pixels()
        return to_response(await made(self._services.images, order), as_pixels)

    async def GenerateStream(
        self, request: pb.GenerateStreamRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.GenerateStreamResponse]:
        """Make one picture and send previews of it."""
        order = await self._order(stream_fields_of(request, request.picture))
        async for part in streamed(self._services.images, order):
            yield to_event(part)

    async def _order(self, fields: dict[str, Any]) -> ImageOrder:
        """Read the fields of a request. A given picture takes long to decode, so others are answered meanwhile."""
        recipe_of = self._services.images.recipe
        if is_edit(fields):
            with reading_pictures(self._services):
                return await asyncio.to_thread(edit_order_from_fields, fields, recipe_of)
        return order_from_fields(fields, recipe_of)

    async def ListModels(
        self, request: pb.ListModelsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListModelsResponse:
        """List the served models."""
        models = (pb.Model(**filled(pb.Model, asdict(card))) for card in self._services.images.models())
        return pb.ListModelsResponse(models=models)


def to_response(answer: ImageAnswer, as_pixels: bool = False) -> pb.GenerateResponse:
    """Return an answer as a message."""
    return pb.GenerateResponse(images=map(to_image, answer.images), **how_made(answer, as_pixels))


def to_event(part: PartialAnswer | ImageAnswer) -> pb.GenerateStreamResponse:
    """Return a part of a stream as a message."""
    if isinstance(part, ImageAnswer):
        return pb.GenerateStreamResponse(completed=to_response(part))
    return pb.GenerateStreamResponse(partial_image=to_partial(part))
