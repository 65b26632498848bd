"""The websocket /v1/images/live, with the client of `websockets`."""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
import json
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from serving.config import ModelSource, ServerConfig
from serving.fronts.access import APIKey, draw_key, hash_key, save_keys
from serving.fronts.services import Services
from serving.images.local import ImageService
from serving.telemetry.metrics import ServerMetrics
from serving.web import live_routes
from serving.web.app import build_app
from tdm_runtime.model.artifacts import BackendConfig
from tests.serving.conftest import RunningServer, start_server
from tests.serving.web.test_edits import encoded, file_of

TIMEOUT_S = 60
PROMPT = {"prompt": "a banana on a blue background", "seed": 3, "num_inference_steps": 4}


def url_of(server: RunningServer) -> str:
    return f"ws://127.0.0.1:{server.port}/v1/images/live"


def on_connection(server: RunningServer, talk: Callable[[ClientConnection], Awaitable[Any]], **options: Any) -> Any:
    """Return what `talk` returns."""

    async def run() -> Any:
        async with asyncio.timeout(TIMEOUT_S), connect(url_of(server), max_size=None, proxy=None, **options) as socket:
            return await talk(socket)

    return asyncio.run(run())


async def asked(socket: ClientConnection, **fields: Any) -> dict[str, Any]:
    await socket.send(json.dumps(fields))
    return dict(json.loads(await socket.recv()))


def pixels_of(event: dict[str, Any]) -> Any:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(event["b64_json"]))))


@pytest.fixture(scope="module")
def drawing() -> str:
    pixels = np.full((64, 64, 3), 255, np.uint8)
    pixels[20:44, 20:44] = (200, 30, 30)
    return encoded(file_of(pixels))


def test_pictures_are_those_of_the_other_routes(server: RunningServer, http: httpx.Client, drawing: str) -> None:
    edit = PROMPT | {"image": drawing, "strength": 0.5}

    async def talk(socket: ClientConnection) -> list[dict[str, Any]]:
        return [await asked(socket, **PROMPT), await asked(socket, **edit)]

    made, changed = on_connection(server, talk)
    assert (made["type"], changed["type"]) == ("image_generation.completed", "image_edit.completed")
    assert (made["message"], changed["message"], changed["num_steps_taken"]) == (1, 2, 2)
    assert made["latency_ms"] >= made["timings"]["total_ms"] > 0
    for event, route, body in ((made, "generations", PROMPT), (changed, "edits", edit)):
        answer = http.post(f"/v1/images/{route}", json=body).json()["data"][0]
        assert answer["receipt"]["digest"] == event["receipt"]["digest"]
        assert answer["receipt"]["pixels_sha256"] == event["receipt"]["pixels_sha256"]


def test_of_messages_that_wait_the_newest_is_answered(server: RunningServer) -> None:
    async def talk(socket: ClientConnection) -> list[dict[str, Any]]:
        for seed in range(50):
            await socket.send(json.dumps(PROMPT | {"seed": seed}))
        events = [json.loads(await socket.recv())]
        while events[-1]["message"] < 50:
            events.append(json.loads(await socket.recv()))
        return events

    events = on_connection(server, talk)
    numbers = [event["message"] for event in events]
    assert numbers == sorted(set(numbers)) and len(numbers) < 40
    assert all(event["receipt"]["seed"] == event["message"] - 1 for event in events)


def test_a_connection_has_one_seed_for_messages_without(server: RunningServer) -> None:
    async def talk(socket: ClientConnection) -> list[int]:
        return [(await asked(socket, prompt="a fox", num_inference_steps=1))["seed"] for _ in range(2)]

    first, second = on_connection(server, talk), on_connection(server, talk)
    assert first[0] == first[1] != second[0]


def test_previews_come_before_the_picture(server: RunningServer) -> None:
    async def talk(socket: ClientConnection) -> list[dict[str, Any]]:
        await socket.send(json.dumps(PROMPT | {"seed": 77, "partial_images": 2}))
        return [json.loads(await socket.recv()) for _ in range(3)]

    kinds = [event["type"].rpartition(".")[2] for event in on_connection(server, talk)]
    assert kinds == ["partial_image", "partial_image", "completed"]


@pytest.mark.parametrize(
    ("message", "code", "said"),
    [
        ("nonsense", "invalid_json", "not JSON"),
        ("[]", "invalid_json", "send an object"),
        (json.dumps(PROMPT | {"steps": 4}), "unknown_parameter", "num_inference_steps"),
        (json.dumps(PROMPT | {"n": 2}), "invalid_value", "one picture"),
        (json.dumps(PROMPT | {"strength": 0.5}), "missing_required_parameter", "image is required"),
        (json.dumps(PROMPT | {"image": "https://example.com/a.png"}), "invalid_value", "no address is fetched"),
        (
            json.dumps(PROMPT | {"num_inference_steps": "auto", "latency_budget_ms": 0.1}),
            "latency_budget_too_small",
            "",
        ),
    ],
)
def test_a_wrong_message_gets_its_error_and_the_next_one_its_picture(
    server: RunningServer, message: str, code: str, said: str
) -> None:
    async def talk(socket: ClientConnection) -> tuple[dict[str, Any], dict[str, Any]]:
        await socket.send(message)
        return json.loads(await socket.recv()), await asked(socket, **PROMPT)

    refused, made = on_connection(server, talk)
    assert (refused["type"], refused["status"], refused["error"]["code"]) == ("error", 400, code)
    assert said in refused["error"]["message"] and made["type"].endswith("completed")


def test_a_message_beyond_the_limit_closes_the_connection(server: RunningServer) -> None:
    async def talk(socket: ClientConnection) -> int:
        with pytest.raises(ConnectionClosed) as closed:
            await socket.send("x" * (16 * 1024 * 1024 + 1))
            await socket.recv()
        assert closed.value.rcvd is not None
        return closed.value.rcvd.code

    assert on_connection(server, talk) == 1009


def status_of(server: RunningServer, **options: Any) -> int:
    async def talk(socket: ClientConnection) -> int:
        return 101

    try:
        return int(on_connection(server, talk, **options))
    except InvalidStatus as refused:
        error = json.loads(refused.response.body)["error"]
        assert error["message"] and error["code"]
        return refused.response.status_code


def test_pages_of_other_sites_are_refused(server: RunningServer) -> None:
    assert status_of(server, origin=f"http://127.0.0.1:{server.port}") == 101
    assert status_of(server, origin="http://evil.example") == 403
    assert status_of(server, origin="null") == 403


def test_a_client_that_leaves_ends_its_picture(server: RunningServer, http: httpx.Client) -> None:
    async def talk(socket: ClientConnection) -> None:
        await socket.send(json.dumps(PROMPT | {"seed": 99}))

    for _ in range(5):
        on_connection(server, talk)
    deadline = time.monotonic() + TIMEOUT_S
    while http.get("/ready").json()["live"]:
        assert time.monotonic() < deadline
    assert 'tdm_requests_total{method="GET",route="/v1/images/live",status="101"}' in http.get("/metrics").text


def test_a_slow_picture_is_given_up_for_a_newer_message_but_never_two_in_a_row(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every picture is slow here: messages come faster than pictures, and each wants to replace the one before."""
    monkeypatch.setattr(live_routes, "GIVE_UP_S", -1.0)
    backend = BackendConfig("torch", threads=1, device="cpu")
    config = ServerConfig(models=(ModelSource(tiny_checkpoint),), backend=backend, state_folder=tmp_path)
    images = ImageService(config, ServerMetrics())
    services = Services.start(config, ServerMetrics(), images)
    answered = 0
    with TestClient(build_app(services)) as client, client.websocket_connect("/v1/images/live") as socket:

        def ask() -> None:
            for seed in itertools.count():
                if answered == 5:
                    return
                socket.send_json({"prompt": "a fox", "seed": seed, "num_inference_steps": 4})
                time.sleep(1e-3)

        asking = threading.Thread(target=ask)
        asking.start()
        while answered < 5:
            assert socket.receive_json()["type"] == "image_generation.completed"
            answered += 1
        asking.join()
    services.close()
    assert images.engine.stats.cancelled > 0


def test_keys_come_as_a_header_or_a_subprotocol_and_a_stopping_server_says_so(
    tmp_path: Path, tiny_checkpoint: Path
) -> None:
    key, keys = draw_key(), tmp_path / "keys.json"
    save_keys(keys, [APIKey("ada", hash_key(key), requests_per_minute=2)])
    small = ["--backend", "torch", "--threads", "1", "--max-batch-size", "1"]
    arguments = ["--checkpoint", str(tiny_checkpoint), *small, "--api-keys", str(keys)]
    server = start_server(tmp_path / "log", *arguments)
    try:
        assert status_of(server) == 401
        assert status_of(server, additional_headers={"authorization": f"Bearer {key}"}) == 101
        assert status_of(server, subprotocols=[f"openai-insecure-api-key.{key}x"]) == 401

        async def talk(socket: ClientConnection) -> tuple[list[dict[str, Any]], int | None]:
            assert socket.subprotocol == "realtime"
            events = [await asked(socket, prompt="a fox", num_inference_steps=1) for _ in range(3)]
            server.process.terminate()
            with pytest.raises(ConnectionClosed) as closed:
                await socket.recv()
            return events, closed.value.rcvd and closed.value.rcvd.code

        events, code = on_connection(server, talk, subprotocols=["realtime", f"openai-insecure-api-key.{key}"])
        assert [event["type"] for event in events] == ["image_generation.completed"] * 2 + ["error"]
        assert events[2]["status"] == 429 and events[2]["retry_after_ms"] > 0
        assert code == 1012
    finally:
        server.stop()
