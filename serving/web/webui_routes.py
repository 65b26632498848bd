"""/sdapi/v1: the routes of Stable Diffusion web UI that local clients use, over the same service."""

from __future__ import annotations

import asyncio
import io
import time
from collections import defaultdict
from typing import Any

from fastapi import FastAPI, Request
from PIL import Image

from serving.fronts.edge import reading_pictures
from serving.fronts.services import Services
from serving.schema.models import ModelCard
from serving.schema.parsing import parse_body, parse_picture_body
from serving.schema.webui import (
    Generated,
    ImageToImage,
    Options,
    TextToImage,
    generated,
    info_of,
    named_by,
)
from serving.web.body import read_json
from serving.web.documentation import documented_body
from serving.web.http_edge import caller_of
from tdm_runtime.families import FAMILIES
from tdm_runtime.params import PromptSyntax

PREFIX = "/sdapi/v1"


class Session:
    """What web UI keeps for its one user, here for each key."""

    def __init__(self) -> None:
        self.model: str | None = None
        """Model of requests that name none; None is the server's default."""
        self.running: set[asyncio.Task[Any]] = set()
        self.started_s = 0.0
        """Start of the latest request, monotonic."""
        self.typical_s = 0.0
        """Duration of the latest answer; 0 before the first."""


class Sessions:
    """The session of each key."""

    def __init__(self) -> None:
        self._by_key: defaultdict[str, Session] = defaultdict(Session)

    def of(self, request: Request) -> Session:
        """Return the session of a request's caller."""
        return self._by_key[caller_of(request).name]


def add_webui_routes(app: FastAPI, services: Services) -> None:
    """Add the routes. None of them is part of the OpenAPI document but the two that make pictures."""
    sessions = Sessions()
    _add_making(app, services, sessions)
    _add_settings(app, services, sessions)
    _add_lists(app, services)


def _add_making(app: FastAPI, services: Services, sessions: Sessions) -> None:
    """Add the routes that make pictures, and those that watch and end them."""
    config, images = services.config, services.images

    async def answer(request: Request, kind: type[TextToImage]) -> Generated:
        session = sessions.of(request)
        task = asyncio.current_task()
        assert task is not None
        with reading_pictures(services):
            body = await read_json(request, config, config.max_picture_body_bytes)
            wanted = await asyncio.to_thread(parse_picture_body, body, kind)
            card = images.model_card(wanted.wanted_model or session.model)
            syntax: PromptSyntax = "a1111" if FAMILIES[card.family].reads_weights else "plain"
            order = await asyncio.to_thread(wanted.to_order, card.id, images.recipe, syntax)
        caller_of(request).spend(order.cost)
        making = asyncio.create_task(images.generate(order))
        session.running.add(making)
        session.started_s = time.monotonic()
        try:
            made = await making
        except asyncio.CancelledError:
            if task.cancelling():  # the client left
                making.cancel()
                raise
            return generated(wanted, [], info_of(order, [p.seed for p in order.pictures], "", "", [], ["interrupted"]))
        finally:
            session.running.discard(making)
        session.typical_s = time.monotonic() - session.started_s
        contents = [image.content for image in made.images]
        seeds, digest = [image.seed for image in made.images], made.images[0].receipt.digest
        texts = [_parameters(content) for content in contents]
        info = info_of(order, seeds, digest, images.recipe(order.model).solver, texts, made.warnings)
        return generated(wanted, contents, info)

    @app.post(f"{PREFIX}/txt2img", openapi_extra=documented_body(json=TextToImage.model_json_schema()))
    async def text_to_image(request: Request) -> Generated:
        """Make pictures, as web UI's clients ask for them."""
        return await answer(request, TextToImage)

    @app.post(f"{PREFIX}/img2img", openapi_extra=documented_body(json=ImageToImage.model_json_schema()))
    async def image_to_image(request: Request) -> Generated:
        """Change a picture, as web UI's clients ask for it."""
        return await answer(request, ImageToImage)

    @app.get(f"{PREFIX}/progress", include_in_schema=False)
    async def progress(request: Request) -> dict[str, Any]:
        session = sessions.of(request)
        num_running = len(session.running)
        elapsed_s = time.monotonic() - session.started_s if num_running else 0.0
        share = min(0.99, elapsed_s / session.typical_s) if session.typical_s else 0.0
        left_s = max(0.0, session.typical_s - elapsed_s) if num_running else 0.0
        state = {"skipped": False, "interrupted": False, "job_count": num_running, "job_no": 0}
        return {"progress": share, "eta_relative": left_s, "state": state, "current_image": None, "textinfo": None}

    async def interrupt(request: Request) -> dict[str, Any]:
        for making in sessions.of(request).running:
            making.cancel()
        return {}

    for name in ("interrupt", "skip"):
        app.post(f"{PREFIX}/{name}", include_in_schema=False)(interrupt)


def _add_settings(app: FastAPI, services: Services, sessions: Sessions) -> None:
    """Add the setting of the model."""
    config, images = services.config, services.images

    @app.get(f"{PREFIX}/options", include_in_schema=False)
    async def options(request: Request) -> dict[str, Any]:
        card = images.model_card(sessions.of(request).model)
        return {"sd_model_checkpoint": _title(card), "sd_checkpoint_hash": card.digest, "samples_format": "png"}

    @app.post(f"{PREFIX}/options", include_in_schema=False)
    async def set_options(request: Request) -> None:
        wanted = parse_body(await read_json(request, config), Options).sd_model_checkpoint
        if wanted:
            sessions.of(request).model = images.model_card(named_by(wanted)).id


def _add_lists(app: FastAPI, services: Services) -> None:
    """Add the lists that clients read at their start."""
    images = services.images

    @app.get(f"{PREFIX}/sd-models", include_in_schema=False)
    async def models() -> list[dict[str, Any]]:
        return [
            {
                "title": _title(card),
                "model_name": card.id,
                "hash": card.digest[:10],
                "sha256": card.digest,
                "filename": card.id,
                "config": None,
            }
            for card in images.models()
            if card.frames is None
        ]

    @app.get(f"{PREFIX}/loras", include_in_schema=False)
    async def loras() -> list[dict[str, Any]]:
        cards = (card for card in images.models() if card.base is not None)
        return [{"name": card.id, "alias": card.id, "path": card.id, "metadata": {}} for card in cards]

    @app.get(f"{PREFIX}/samplers", include_in_schema=False)
    async def samplers() -> list[dict[str, Any]]:
        solvers = dict.fromkeys(images.recipe(card.id).solver for card in images.models())
        return [{"name": solver, "aliases": [solver], "options": {}} for solver in solvers]

    @app.get(f"{PREFIX}/schedulers", include_in_schema=False)
    async def schedulers() -> list[dict[str, Any]]:
        return [{"name": "automatic", "label": "Automatic", "aliases": None}]

    @app.get(f"{PREFIX}/upscalers", include_in_schema=False)
    async def upscalers() -> list[dict[str, Any]]:
        return [{"name": "None", "model_name": None, "model_path": None, "model_url": None, "scale": 1}]

    def nothing() -> list[Any]:
        return []

    for name in ("latent-upscale-modes", "sd-vae", "sd-modules", "hypernetworks", "face-restorers", "prompt-styles"):
        app.get(f"{PREFIX}/{name}", include_in_schema=False)(nothing)

    @app.get(f"{PREFIX}/embeddings", include_in_schema=False)
    async def embeddings() -> dict[str, Any]:
        return {"loaded": {}, "skipped": {}}


def _title(card: ModelCard) -> str:
    return f"{card.id} [{card.digest[:10]}]"


def _parameters(content: bytes) -> str:
    """Return the text that describes a picture in its own file."""
    with Image.open(io.BytesIO(content)) as picture:
        return str(getattr(picture, "text", {}).get("parameters", ""))
