"""Targets of a measurement: an OpenAI-compatible images server over the wire, or the engine in this process."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import struct
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import aiohttp
from PIL import Image

from benchmarks.workload import Request, Size
from tdm_runtime.engine.delivery import Delivery
from tdm_runtime.engine.engine import DiffusionEngine, EngineConfig
from tdm_runtime.engine.warm_up import warm_up
from tdm_runtime.errors import OverloadedError, TDMError
from tdm_runtime.media.given_picture import to_edit
from tdm_runtime.media.image_file import encode_image
from tdm_runtime.model.loaded_model import LoadedModel
from tdm_runtime.params import SamplingParams
from tdm_runtime.scheduling.cost_model import CostModel

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
ROUTE = "/v1/images/generations"
EDIT_ROUTE = "/v1/images/edits"
TIMEOUT_S = 60.0
"""A request without an answer after this time counts as failed."""
KEEPALIVE_S = 2.0
"""Shorter than any server's keep-alive: a request on a connection that the server is closing would fail."""
REFUSED = 429


@dataclass(frozen=True)
class Outcome:
    """Result of one request."""

    answered_s: float
    """Time of the last byte of the answer, in seconds of `time.perf_counter`."""
    error: str | None = None
    """Short error code; None if a picture arrived."""
    is_refused: bool = False
    """Whether the server rejected the request because of load."""
    steps_used: int | None = None
    """Steps taken; None if the answer does not say."""
    stages_ms: Mapping[str, float] = field(default_factory=dict)
    """Stage -> duration; the durations add up to the round trip. Empty if the answer has no timings."""
    retry_after_s: float = 0.0
    """Retry-After of a rejection; 0 if there is none."""
    is_budget_kept: bool | None = None
    """Whether the latency budget was met, by the server's clock; None if the answer does not say."""


class Target(Protocol):
    """Server or engine that answers requests."""

    async def send(self, request: Request) -> Outcome:
        """Ask for one picture and wait for it. Errors are reported in the outcome and never raised."""
        ...


# -- the engine in this process ---------------------------------------------------------------


@contextmanager
def running_engine(
    model: LoadedModel, config: EngineConfig = EngineConfig(), costs: CostModel | None = None
) -> Iterator[DiffusionEngine]:
    """Start an engine and warm it up as a server does, so that it knows the cost of its calls.

    Args:
        costs: Its cost model, without any costs; None makes one.
    """
    with DiffusionEngine(model, config, costs=costs) as engine:
        warm_up(engine)
        yield engine


class EngineTarget:
    """Target that makes PNG bytes with a running `DiffusionEngine`."""

    def __init__(self, engine: DiffusionEngine) -> None:
        self._engine = engine
        self._encoding = ThreadPoolExecutor(1, "encode")

    async def send(self, request: Request) -> Outcome:
        """Implement `Target.send`. "auto" asks for the recipe's largest step count and allows every smaller one."""
        sent_s = time.perf_counter()
        try:
            params, delivery = self._asked(request)
            picture = await asyncio.wrap_future(self._engine.submit(params, delivery))
            encoding_s = time.perf_counter()
            loop = asyncio.get_running_loop()
            png = await loop.run_in_executor(self._encoding, encode_image, picture.pixels, "png")
        except OverloadedError as error:
            return Outcome(time.perf_counter(), type(error).__name__, True, retry_after_s=error.retry_after_s)
        except TDMError as error:
            return Outcome(time.perf_counter(), type(error).__name__)
        answered_s = time.perf_counter()
        timings = picture.timings
        stages = split_stages(
            vars(timings) | {"encode_ms": 1e3 * (answered_s - encoding_s)}, 1e3 * (answered_s - sent_s)
        )
        error_code = picture_fault(png, (params.width, params.height))
        return Outcome(answered_s, error_code, False, picture.params.num_inference_steps, stages)

    def _asked(self, request: Request) -> tuple[SamplingParams, Delivery]:
        recipe = self._engine.model.recipe
        steps, fewest = request.num_inference_steps, request.min_inference_steps
        if steps is None:
            steps = recipe.default_steps
        elif steps == "auto":
            steps, fewest = max(recipe.step_counts), 1 if fewest is None else fewest
        width, height = request.size or recipe.native_sizes[0]
        edit = None
        if request.strength is not None:
            edit = to_edit(Image.fromarray(request.given_pixels()), request.strength, width, height)
        params = SamplingParams(request.prompt, request.seed, steps, width, height, edit=edit)
        return params, Delivery(latency_budget_ms=request.latency_budget_ms, min_inference_steps=fewest)


# -- a server over the wire -------------------------------------------------------------------


class OpenAITarget:
    """Target for any server with the OpenAI images API. Fields beyond the API are sent only if they are set."""

    def __init__(self, session: aiohttp.ClientSession, base_url: str, model: str | None = None) -> None:
        self._session = session
        self._base_url = base_url.rstrip("/")
        self._model = model

    async def send(self, request: Request) -> Outcome:
        """Implement `Target.send`."""
        body, route = self._body(request), ROUTE if request.strength is None else EDIT_ROUTE
        sent_s = time.perf_counter()
        try:
            async with self._session.post(self._base_url + route, json=body) as response:
                raw = await response.read()
        except TimeoutError:
            return Outcome(time.perf_counter(), "timeout")
        except (aiohttp.ClientError, OSError) as error:
            return Outcome(time.perf_counter(), type(error).__name__)
        answered_s = time.perf_counter()
        if response.status != 200:
            code, is_refused = _error_code(response.status, raw), response.status == REFUSED
            return Outcome(answered_s, code, is_refused, retry_after_s=_retry_after_s(response.headers))
        try:
            answer = json.loads(raw)
            first = answer["data"][0]
            png = base64.b64decode(first["b64_json"], validate=True)
            steps_used = first.get("num_inference_steps")
            stages = split_stages(answer.get("timings") or {}, 1e3 * (answered_s - sent_s))
            is_kept = answer.get("latency_budget_kept")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, binascii.Error):
            return Outcome(answered_s, "unreadable_answer")
        return Outcome(answered_s, picture_fault(png, request.size), False, steps_used, stages, is_budget_kept=is_kept)

    def _body(self, request: Request) -> dict[str, Any]:
        size = None if request.size is None else f"{request.size[0]}x{request.size[1]}"
        fields: dict[str, Any] = {
            "prompt": request.prompt,
            "response_format": "b64_json",
            "model": self._model,
            "size": size,
            "seed": request.seed,
            "num_inference_steps": request.num_inference_steps,
            "latency_budget_ms": request.latency_budget_ms,
            "min_inference_steps": request.min_inference_steps,
            "strength": request.strength,
        }
        if request.strength is not None:
            fields["image"] = base64.b64encode(encode_image(request.given_pixels(), "png")).decode()
        return {name: value for name, value in fields.items() if value is not None}


@asynccontextmanager
async def http_session() -> AsyncIterator[aiohttp.ClientSession]:
    """Open a session without a connection limit: waiting for a connection would hide the server's delay."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S)
    async with aiohttp.ClientSession(
        connector=connector, timeout=aiohttp.ClientTimeout(total=TIMEOUT_S), trust_env=False
    ) as session:
        yield session


async def served_models(base_url: str) -> list[dict[str, Any]]:
    """Return the models listed by GET /v1/models; empty if the server has no such route.

    Raises:
        ConnectionError: no server listens there.
    """
    url = base_url.rstrip("/") + "/v1/models"
    try:
        async with http_session() as session, session.get(url) as response:
            answer = await response.json(content_type=None)
            return [dict(card) for card in answer["data"]]
    except (aiohttp.ClientConnectionError, aiohttp.InvalidURL, TimeoutError, OSError) as error:
        raise ConnectionError(
            f"{base_url} does not answer ({error}); start the server, or pass its address with --base-url"
        ) from (None)
    except (aiohttp.ClientError, ValueError, KeyError, TypeError):
        return []


# -- both -------------------------------------------------------------------------------------


def picture_fault(png: bytes, size: Size | None) -> str | None:
    """Return an error code if the bytes are not a PNG of the requested size; else None."""
    if not png.startswith(PNG_MAGIC) or len(png) < 24:
        return "not_a_png"
    if size is not None and struct.unpack(">II", png[16:24]) != size:  # IHDR is always the first chunk
        return "wrong_size"
    return None


def split_stages(timings: Mapping[str, Any], round_trip_ms: float, transport: str = "http") -> dict[str, float]:
    """Split a round trip by the `timings` of the answer; the rest is transport or the engine's hand-over."""
    if "queue_ms" not in timings:
        return {}
    stages = {"queue": float(timings["queue_ms"]), "text": float(timings["text_ms"])}
    if timings.get("image_ms"):
        stages["image"] = float(timings["image_ms"])
    stages |= {f"step {n}": float(step_ms) for n, step_ms in enumerate(timings["steps_ms"], 1)}
    stages |= {"decode": float(timings["decode_ms"]), "encode": float(timings["encode_ms"])}
    total_ms = timings.get("total_ms")
    stages["engine hand-over"] = (round_trip_ms if total_ms is None else float(total_ms)) - sum(stages.values())
    if total_ms is not None:
        stages[transport] = round_trip_ms - float(total_ms)
    return stages


def _retry_after_s(headers: Mapping[str, str]) -> float:
    """Return the Retry-After of an answer, read as the official client does; 0 if there is none."""
    for name, seconds in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            return max(0.0, seconds * float(headers[name]))
        except (KeyError, ValueError):
            continue
    return 0.0


def _error_code(status: int, raw: bytes) -> str:
    """Return for example "429 queue_full", or only the status if the body has no code."""
    try:
        code = json.loads(raw)["error"]["code"]
    except (ValueError, KeyError, TypeError):
        code = None
    return f"{status} {code}" if isinstance(code, str) else str(status)
