"""POST /v1/images/generations and GET /v1/models."""

from __future__ import annotations

from fastapi import FastAPI, Request, Response

from serving.fronts.services import Services
from serving.schema.image_request import ImageRequest, order_from_body
from serving.schema.image_response import ImageResponse, to_event, to_response
from serving.schema.models import ModelCard, ModelList
from serving.web.body import read_json
from serving.web.documentation import documented_body
from serving.web.generation import Shapes, accepted_formats, default_seed, documented_answers, respond
from tdm_runtime.media.image_file import ImageFormat

MEDIA_TYPES: dict[str, ImageFormat] = {"image/png": "png", "image/webp": "webp", "image/jpeg": "jpeg"}
PICTURES = Shapes(to_response, to_event)
ANSWERS = documented_answers(
    "The pictures; with `stream`, events; with `Accept: image/png`, webp or jpeg, a file.", MEDIA_TYPES
)


def add_image_routes(app: FastAPI, services: Services) -> None:
    """Add the routes of pictures and models."""

    @app.post(
        "/v1/images/generations",
        openapi_extra=documented_body(json=ImageRequest.model_json_schema()),
        response_model=ImageResponse,
        responses=ANSWERS,
    )
    async def generate_images(request: Request) -> Response:
        """Make pictures for a prompt."""
        body = await read_json(request, services.config)
        accepted = accepted_formats(request.headers.get("accept", "*/*"), MEDIA_TYPES)
        order = order_from_body(body, services.images.recipe, accepted, default_seed(request))
        return await respond(request, services, body, order, PICTURES, as_file=bool(accepted))

    @app.get("/v1/models")
    async def list_models() -> ModelList:
        """List the served models."""
        return ModelList(data=services.images.models())

    @app.get("/v1/models/{model_id}")
    async def get_model(model_id: str) -> ModelCard:
        """Describe one model."""
        return services.images.model_card(model_id)
