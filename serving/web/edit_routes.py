"""POST /v1/images/edits."""

from __future__ import annotations

import asyncio
import hashlib
from functools import partial
from typing import Any

from fastapi import FastAPI, Request, Response

from serving.errors import invalid
from serving.fronts.edge import reading_pictures
from serving.fronts.services import Services
from serving.schema.edit_request import EditRequest, edit_order_from_body, edit_order_from_fields
from serving.schema.image_response import ImageResponse, to_edit_event, to_response
from serving.schema.order import ImageOrder
from serving.web.body import read_form, read_json
from serving.web.documentation import documented_body
from serving.web.generation import Shapes, accepted_formats, default_seed, respond
from serving.web.image_routes import ANSWERS, MEDIA_TYPES

PICTURES = Shapes(to_response, to_edit_event)
FILES = ("image", "mask")


def add_edit_routes(app: FastAPI, services: Services) -> None:
    """Add the routes that take pictures."""
    config, schema = services.config, EditRequest.model_json_schema()

    @app.post(
        "/v1/images/edits",
        openapi_extra=documented_body(json=schema, form=_form_schema(schema)),
        response_model=ImageResponse,
        responses=ANSWERS,
    )
    async def edit_image(request: Request) -> Response:
        """Change a picture by a prompt."""
        with reading_pictures(services):
            order, fingerprint, is_file = await read_order(request)
        return await respond(request, services, fingerprint, order, PICTURES, as_file=is_file)

    async def read_order(request: Request) -> tuple[ImageOrder, bytes, bool]:
        """Return the order, the sha256 of the request's body, and whether a file is the whole answer."""
        accepted = accepted_formats(request.headers.get("accept", "*/*"), MEDIA_TYPES)
        if request.headers.get("content-type", "").startswith("multipart/form-data"):
            form = await read_form(request, config, FILES)
            read, body = partial(edit_order_from_fields, form.fields, is_text=True), form.body
        else:
            body = await read_json(request, config, config.max_picture_body_bytes)
            read = partial(edit_order_from_body, body)
        # Pictures take long to decode, so other requests are answered meanwhile.
        order = await asyncio.to_thread(
            read, recipe_of=services.images.recipe, file_formats=accepted, default_seed=default_seed(request)
        )
        return order, hashlib.sha256(body).digest(), bool(accepted)

    @app.post("/v1/images/variations", include_in_schema=False)
    async def vary_image() -> Response:
        """Say what makes variations here."""
        message = "variations are not served; POST /v1/images/edits with image, a prompt and strength"
        raise invalid(message, None, "not_found", 404)


def _form_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a form: its pictures are files."""
    file: dict[str, Any] = {"type": "string", "format": "binary"}
    kinds = {"image": {"anyOf": [file, {"type": "array", "items": file}]}, "mask": file}
    files = {name: {**kinds[name], "description": schema["properties"][name]["description"]} for name in FILES}
    return {**schema, "properties": {**schema["properties"], **files}}
