"""/v1/videos: clips, made in the background."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import FastAPI, Query, Request, Response

from serving.errors import invalid
from serving.fronts.services import Services
from serving.jobs.job import Job, JobRequest
from serving.jobs.video_job import frame_parts
from serving.schema.parsing import parse_body, validate
from serving.schema.prompt_tags import with_lora
from serving.schema.video_request import VideoFormat, VideoGenerationRequest, VideoRequest
from serving.schema.video_response import VideoResponse, to_event, to_response
from serving.web.body import read_form, read_json
from serving.web.documentation import documented_body
from serving.web.file_routes import file_response
from serving.web.generation import Shapes, accepted_formats, default_seed, documented_answers, respond
from serving.web.http_edge import caller_of
from serving.web.job_routes import MAX_PAGE, check_decoder, create_job
from serving.web.video_schema import (
    POLL_AFTER_MS,
    DeletedVideo,
    Video,
    VideoList,
    VideoVariant,
    from_form,
    to_job_request,
    to_video,
)

VIDEO_SCHEMA = VideoRequest.model_json_schema()
MEDIA_TYPES: dict[str, VideoFormat] = {
    "video/mp4": "mp4",
    "video/webm": "webm",
    "image/webp": "webp",
    "image/gif": "gif",
}
CLIPS = Shapes(to_response, to_event)
ANSWERS = documented_answers(
    "The clip; with `stream`, events; with `Accept: video/mp4`, video/webm, image/webp or image/gif, a file.",
    MEDIA_TYPES,
)


def add_video_routes(app: FastAPI, services: Services) -> None:
    """Add the routes of clips."""
    config = services.config

    @app.post("/v1/videos", openapi_extra=documented_body(json=VIDEO_SCHEMA, form=VIDEO_SCHEMA), response_model=Video)
    async def create_video(request: Request) -> Response:
        """Start making a clip. A model that makes pictures walks around a circle of noise."""
        if request.headers.get("content-type", "").startswith("multipart/form-data"):
            wanted = validate(from_form((await read_form(request, config)).fields), VideoRequest)
        else:
            wanted = parse_body(await read_json(request, config), VideoRequest)
        wanted = with_lora(wanted, services.images.recipe)
        plan = wanted.plan(services.images.recipe(wanted.model))
        order = plan.order
        (params,) = order.pictures
        check_decoder(params.decoder, services.images.model_card(order.model))
        parts = frame_parts(plan.num_frames) if params.frames is None else [{}]
        asked = JobRequest("video", caller_of(request).name, order.model, to_job_request(plan, wanted), parts)
        return _shown(
            await create_job(request, services, asked, len(parts) * order.cost, wanted.model_dump_json().encode())
        )

    @app.post(
        "/v1/videos/generations",
        openapi_extra=documented_body(json=VideoGenerationRequest.model_json_schema()),
        response_model=VideoResponse,
        responses=ANSWERS,
    )
    async def generate_video(request: Request) -> Response:
        """Make a short clip while the client waits."""
        body = await read_json(request, config)
        wanted = with_lora(parse_body(body, VideoGenerationRequest), services.images.recipe)
        if accepted := accepted_formats(request.headers.get("accept", "*/*"), MEDIA_TYPES):
            wanted = wanted.as_file(accepted)
        order = wanted.to_order(services.images.recipe(wanted.model), default_seed(request))
        return await respond(request, services, body, order, CLIPS, as_file=bool(accepted))

    @app.get("/v1/videos")
    async def list_videos(
        request: Request,
        after: Annotated[str | None, Query(max_length=64)] = None,
        limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> VideoList:
        """List the caller's clips, the newest first."""
        found = await services.jobs.page("video", caller_of(request).name, after, limit + 1, order == "desc")
        data = [to_video(job) for job in found[:limit]]
        return VideoList(
            data=data,
            first_id=data[0].id if data else None,
            last_id=data[-1].id if data else None,
            has_more=len(found) > limit,
        )

    @app.get("/v1/videos/{video_id}", response_model=Video)
    async def get_video(video_id: str, request: Request) -> Response:
        """Return the progress of a clip."""
        return _shown(await services.jobs.get("video", caller_of(request).name, video_id))

    @app.get("/v1/videos/{video_id}/content", response_class=Response)
    async def get_content(video_id: str, request: Request, variant: VideoVariant = "video") -> Response:
        """Fetch a clip in its format, its first frame or its spritesheet as PNG."""
        job = await services.jobs.get("video", caller_of(request).name, video_id)
        if job.status != "completed":
            message = f"video {job.id} is {job.status}; fetch it when it is completed"
            raise invalid(message, "video_id", f"video_{job.status}", 409)
        return await file_response(services.artifacts, job.result[variant], request)

    @app.delete("/v1/videos/{video_id}")
    async def delete_video(video_id: str, request: Request) -> DeletedVideo:
        """Delete a clip, finished or not."""
        await services.jobs.delete("video", caller_of(request).name, video_id)
        return DeletedVideo(id=video_id)


def _shown(job: Job) -> Response:
    headers = {} if job.is_finished else {"openai-poll-after-ms": str(POLL_AFTER_MS)}
    return Response(to_video(job).model_dump_json(), media_type="application/json", headers=headers)
