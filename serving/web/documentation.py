"""The OpenAPI document. It adds what FastAPI cannot know: bodies that are parsed by hand, errors and keys."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from serving.fronts.idempotency import MAX_KEY_CHARACTERS
from serving.fronts.services import Services
from serving.web.error_schema import ErrorBody, ErrorDetail, InferenceErrorBody
from serving.web.http_edge import INFERENCE_PATH, OPEN_PATHS, OPEN_PREFIXES

ERRORS = (
    "Refused or failed. `message` names the value, the limit and the remedy. With `x-should-retry: false` the same "
)
ERRORS += "request fails again; `retry-after` and `retry-after-ms` say when to send it again."

MEDIA_TYPES = {"json": "application/json", "jsonl": "application/jsonl", "form": "multipart/form-data"}
IDEMPOTENCY_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "description": "Repeated requests with the same key get the answer of the first one.",
    "schema": {"type": "string", "pattern": f"^[ -~]{{1,{MAX_KEY_CHARACTERS}}}$"},
}


def document(app: FastAPI, services: Services) -> None:
    """Complete /openapi.json with what FastAPI does not know."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app, services)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _document(app: FastAPI, services: Services) -> dict[str, Any]:
    spec = get_openapi(title=app.title, version=app.version, routes=app.routes, description=app.description)
    components = spec.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)  # FastAPI's own error shape, which this server never sends
    schemas["ErrorDetail"] = ErrorDetail.model_json_schema()
    schemas["ErrorBody"] = ErrorBody.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas["ErrorBody"].pop("$defs", None)
    schemas["InferenceErrorBody"] = InferenceErrorBody.model_json_schema()
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in spec["paths"].items():
        error = "InferenceErrorBody" if INFERENCE_PATH.fullmatch(path) else "ErrorBody"
        for operation in operations.values():
            operation["responses"].pop("422", None)
            operation["responses"]["default"] = {
                "description": ERRORS,
                "headers": {"x-request-id": {"schema": {"type": "string"}}},
                "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{error}"}}},
            }
            is_open = path in OPEN_PATHS or path.startswith(OPEN_PREFIXES)
            operation["security"] = [{}] if is_open or services.config.api_keys is None else [{"key": []}]
    return spec


def documented_body(**schemas: dict[str, Any]) -> dict[str, Any]:
    """Document a request body that is parsed by hand, more strictly than FastAPI would.

    Args:
        schemas: JSON schema of each accepted media type, by its name in `MEDIA_TYPES`.
    """
    content = {MEDIA_TYPES[name]: {"schema": schema} for name, schema in schemas.items()}
    return {"requestBody": {"required": True, "content": content}, "parameters": [IDEMPOTENCY_KEY]}
