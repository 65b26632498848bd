"""The HTTP application."""

from __future__ import annotations

from fastapi import FastAPI

from serving.services import Services
from serving.web.edge import add_edges
from serving.web.images import add_image_routes
from serving.web.operations import add_operation_routes, add_playground


def build_app(services: Services) -> FastAPI:
    """Return the ASGI application of a replica's services."""
    app = FastAPI(title="TDM image server", version="1", docs_url=None, redoc_url=None)
    add_image_routes(app, services)
    add_operation_routes(app, services)
    add_playground(app)
    add_edges(app, services)
    return app
