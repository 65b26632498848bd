"""Whether it runs, how it does, and the playground."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI, Response
from fastapi.responses import FileResponse, PlainTextResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel

from serving.errors import not_ready
from serving.fronts.services import Services

STATIC_FILES = (
    "index.html",
    "playground.css",
    *(f"{module}.js" for module in ("playground", "server", "sse", "latency", "copies", "page")),
)
STATIC_FOLDER = Path(__file__).resolve().parent.parent / "static"


class Health(BaseModel):
    """Answer of GET /health."""

    status: str = "ok"


class Readiness(BaseModel):
    """Answer of GET /ready."""

    status: str = "ready"
    live: int
    """Pictures accepted and not yet answered."""
    max_live: int
    """More are refused."""


def add_operation_routes(app: FastAPI, services: Services) -> None:
    """Health, readiness and metrics."""

    @app.get("/health")
    async def health() -> Health:
        """Whether the process answers."""
        return Health()

    @app.get("/ready")
    async def ready() -> Readiness:
        """Whether pictures can be made, and how many are being made."""
        if not services.is_ready:
            raise not_ready("the server is stopping, or its engine is not running")
        return Readiness(live=services.images.num_live, max_live=services.config.engine.max_live)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Prometheus metrics."""
        return Response(services.metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")


def add_playground(app: FastAPI) -> None:
    """The page.

    Raises:
        FileNotFoundError: its files are missing; better now than at the first visit.
    """
    if missing := [name for name in STATIC_FILES if not (STATIC_FOLDER / name).is_file()]:
        raise FileNotFoundError(f"{STATIC_FOLDER} lacks {', '.join(missing)}; reinstall the package")

    @app.get("/", include_in_schema=False)
    async def playground() -> FileResponse:
        return FileResponse(STATIC_FOLDER / "index.html")

    app.mount("/playground/static", StaticFiles(directory=STATIC_FOLDER))
