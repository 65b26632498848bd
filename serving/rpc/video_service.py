"""tdm.images.v1.VideoService: clips, in typed messages with the fields of POST /v1/videos/generations."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc

from serving.fronts.services import Services
from serving.rpc.calls import made, streamed
from serving.rpc.messages import fields_of, how_made, stream_fields_of, to_image, to_partial, wants_pixels
from serving.rpc.protos import images_pb2 as pb
from serving.schema.answers import ImageAnswer, PartialAnswer
from serving.schema.video_request import video_order_from_fields


class VideoServicer:
    """Answers the calls of one replica."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def Generate(
        self, request: pb.GenerateVideoRequest, context: grpc.aio.ServicerContext
    ) -> pb.GenerateVideoResponse:
        """Make a clip."""
        order = video_order_from_fields(fields_of(request), self._services.images.recipe)
        if as_pixels := wants_pixels(request):
            order = order.as_pixels()
        return to_response(await made(self._services.images, order), as_pixels)

    async def GenerateStream(
        self, request: pb.GenerateVideoStreamRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.GenerateVideoStreamResponse]:
        """Make a clip and send previews of its first frame."""
        order = video_order_from_fields(stream_fields_of(request, request.video), self._services.images.recipe)
        async for part in streamed(self._services.images, order):
            yield to_event(part)


def to_response(answer: ImageAnswer, as_pixels: bool = False) -> pb.GenerateVideoResponse:
    """Return an answer as a message."""
    (clip,) = answer.images
    frames = clip.receipt.frames
    return pb.GenerateVideoResponse(video=to_image(clip), num_frames=frames, **how_made(answer, as_pixels))


def to_event(part: PartialAnswer | ImageAnswer) -> pb.GenerateVideoStreamResponse:
    """Return a part of a stream as a message."""
    if isinstance(part, ImageAnswer):
        return pb.GenerateVideoStreamResponse(completed=to_response(part))
    return pb.GenerateVideoStreamResponse(partial_image=to_partial(part))
