"""The HTTP application."""

from __future__ import annotations

from fastapi import FastAPI

from serving.fronts.services import Services
from serving.web.batch_routes import add_batch_routes
from serving.web.documentation import document
from serving.web.edit_routes import add_edit_routes
from serving.web.file_routes import add_file_routes
from serving.web.http_edge import add_edges
from serving.web.image_routes import add_image_routes
from serving.web.inference_routes import add_inference_routes
from serving.web.live_routes import add_live_routes
from serving.web.operation_routes import add_operation_routes, add_playground
from serving.web.proxied import PublicAddresses
from serving.web.video_routes import add_video_routes
from serving.web.webui_routes import add_webui_routes

DESCRIPTION = (
    "Pictures in 1 to 4 deterministic diffusion steps. Follows the OpenAI API; sampling fields follow diffusers."
)


def build_app(services: Services) -> FastAPI:
    """Return the ASGI application that serves a replica."""
    app = FastAPI(title="tdm-serve", version="1", description=DESCRIPTION, docs_url=None, redoc_url=None)
    add_image_routes(app, services)
    add_edit_routes(app, services)
    add_live_routes(app, services)
    add_file_routes(app, services)
    add_video_routes(app, services)
    add_webui_routes(app, services)
    add_batch_routes(app, services)
    add_inference_routes(app, services)
    add_operation_routes(app, services)
    add_playground(app)
    add_edges(app, services)
    app.add_middleware(PublicAddresses, config=services.config)  # the outermost
    document(app, services)
    return app
