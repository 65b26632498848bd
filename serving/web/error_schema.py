"""Bodies of error responses, for the OpenAPI document."""

from __future__ import annotations

from pydantic import BaseModel


class ErrorDetail(BaseModel):
    """Description of an error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Body of every error response, except those of the Open Inference Protocol."""

    error: ErrorDetail


class InferenceErrorBody(BaseModel):
    """Body of every error response of the Open Inference Protocol."""

    error: str
