"""Routes of /v2: the Open Inference Protocol, version 2, for clients of KServe and Triton.

`serving/schema/inference.py` has what gRPC shares. Every route of a model also exists below `/versions/{version}`.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request, Response

from serving.errors import not_ready
from serving.fronts.edge import reading_pictures
from serving.fronts.services import Services
from serving.schema.edit_request import is_edit
from serving.schema.inference import (
    PLATFORM,
    SERVER,
    VERSION,
    ModelTensors,
    TensorMetadata,
    check_version,
    order_of,
    tensors_of,
)
from serving.schema.order import ImageOrder
from serving.web.body import check_media_type, read_bytes
from serving.web.documentation import documented_body
from serving.web.http_edge import caller_of
from serving.web.inference_schema import JSON_LENGTH, InferBody, InferResponse, read_infer, to_body
from tdm_runtime.version import package_version

MODEL = "/v2/models/{name}"
VERSION_OF_MODEL = MODEL + "/versions/{version}"
BINARY = "application/octet-stream"
ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The outputs; binary tensor data follows the JSON where the request asks for it.",
        "content": {BINARY: {"schema": {"type": "string", "format": "binary"}}},
    }
}


@dataclass(frozen=True)
class Live:
    """Answer of GET /v2/health/live."""

    live: bool = True


@dataclass(frozen=True)
class Ready:
    """Answer of GET /v2/health/ready."""

    ready: bool = True


@dataclass(frozen=True)
class ModelReady:
    """Answer of GET /v2/models/{name}/ready."""

    name: str
    ready: bool = True


@dataclass(frozen=True)
class ServerMetadata:
    """Answer of GET /v2."""

    name: str = SERVER
    version: str = field(default_factory=package_version)
    extensions: tuple[str, ...] = ("binary_tensor_data",)


@dataclass(frozen=True)
class ModelMetadata:
    """Answer of GET /v2/models/{name}."""

    name: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]
    versions: tuple[str, ...] = (VERSION,)
    platform: str = PLATFORM


def add_inference_routes(app: FastAPI, services: Services) -> None:
    """Add the routes of the protocol."""
    config = services.config

    def check_model(request: Request, name: str) -> ModelTensors:
        card = services.images.model_card(name)
        check_version(card, request.path_params.get("version", ""))
        return tensors_of(card)

    def check_ready() -> None:
        if not services.is_ready:
            raise not_ready("the server is stopping, or its engine is not running")

    @app.get("/v2")
    async def server_metadata() -> ServerMetadata:
        """Return the server's name, version and extensions of the protocol."""
        return ServerMetadata()

    @app.get("/v2/health/live")
    async def live() -> Live:
        """Answer while the process runs."""
        return Live()

    @app.get("/v2/health/ready")
    async def server_ready() -> Ready:
        """Answer while pictures can be made; else 503."""
        check_ready()
        return Ready()

    @app.get(MODEL)
    @app.get(VERSION_OF_MODEL, include_in_schema=False)
    async def model_metadata(request: Request, name: str) -> ModelMetadata:
        """Return a model's inputs and outputs."""
        return ModelMetadata(name, *check_model(request, name).described())

    @app.get(f"{MODEL}/ready")
    @app.get(f"{VERSION_OF_MODEL}/ready", include_in_schema=False)
    async def model_ready(request: Request, name: str) -> ModelReady:
        """Answer while a model can make pictures; else 503."""
        check_model(request, name)
        check_ready()
        return ModelReady(name)

    @app.post(
        f"{MODEL}/infer",
        openapi_extra={"requestBody": documented_body(json=InferBody.model_json_schema())["requestBody"]},
        response_model=InferResponse,
        responses=ANSWERS,
    )
    @app.post(f"{VERSION_OF_MODEL}/infer", include_in_schema=False)
    async def infer(request: Request, name: str) -> Response:
        """Make a picture or clip from tensors."""
        caller, json_length = caller_of(request), request.headers.get(JSON_LENGTH)
        check_media_type(request, "application/json" if json_length is None else BINARY)
        kind = check_model(request, name)
        length = request.headers.get("content-length")
        if length is not None and int(length) <= config.max_body_bytes:
            asked = read_infer(await read_bytes(request, config), name, json_length, kind)
            order = await read_order(kind, asked.fields)
        else:
            with reading_pictures(services):
                body = await read_bytes(request, config, config.max_picture_body_bytes)
                asked = await asyncio.to_thread(read_infer, body, name, json_length, kind)
                order = await read_order(kind, asked.fields)
        caller.spend(order.cost)
        answer = await services.images.generate(order)
        content, json_end = await asyncio.to_thread(to_body, answer, asked)
        if json_end is None:
            return Response(content, media_type="application/json")
        return Response(content, media_type=BINARY, headers={JSON_LENGTH: str(json_end)})

    async def read_order(kind: ModelTensors, fields: dict[str, Any]) -> ImageOrder:
        """Return the order. A given picture takes long to decode, so others are answered meanwhile."""
        if is_edit(fields):
            return await asyncio.to_thread(order_of, kind, fields, services.images.recipe)
        return order_of(kind, fields, services.images.recipe)
