"""Routes of health, readiness, metrics and the playground."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, PlainTextResponse
from fastapi.staticfiles import StaticFiles

from serving.errors import not_ready
from serving.fronts.services import Services

STATIC_FILES = (
    "index.html",
    "playground.css",
    *(f"{module}.js" for module in ("playground", "server", "sse", "latency", "copies", "page")),
)
STATIC_FOLDER = Path(__file__).resolve().parent.parent / "static"


@dataclass(frozen=True)
class Health:
    """Answer of GET /health."""

    status: str = "ok"


@dataclass(frozen=True, kw_only=True)
class Readiness:
    """Answer of GET /ready."""

    status: str = "ready"
    live: int
    """Number of pictures that were accepted and are not yet answered."""
    max_live: int
    """Largest value of `live`; more pictures are refused."""


def add_operation_routes(app: FastAPI, services: Services) -> None:
    """Add the routes of health, readiness and metrics."""

    @app.get("/health")
    async def health() -> Health:
        """Answer while the process runs."""
        return Health()

    @app.get("/ready")
    async def ready() -> Readiness:
        """Return the number of pictures in progress; 503 while no pictures can be made."""
        if not services.is_ready:
            raise not_ready("the server is stopping, or its engine is not running")
        return Readiness(live=services.images.num_live, max_live=services.config.engine.max_live)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Return the metrics in Prometheus' text format."""
        return Response(services.metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")


def add_playground(app: FastAPI) -> None:
    """Add the playground's page and its files.

    Raises:
        FileNotFoundError: files are missing. The check is here, so that the start fails and not the first visit.
    """
    if missing := [name for name in STATIC_FILES if not (STATIC_FOLDER / name).is_file()]:
        raise FileNotFoundError(f"{STATIC_FOLDER} lacks {', '.join(missing)}; reinstall the package")

    page = (STATIC_FOLDER / "index.html").read_text(encoding="utf-8")

    @app.get("/", include_in_schema=False)
    async def playground(request: Request) -> HTMLResponse:
        prefix = request.scope.get("root_path", "")  # a proxy may show the page at it without a slash at the end
        return HTMLResponse(page.replace('="./', f'="{prefix}/') if prefix else page)

    app.mount("/playground/static", StaticFiles(directory=STATIC_FOLDER))
