"""Keys, quotas, limits, safety, pictures as files and idempotency, on the application without a network."""

from __future__ import annotations

import asyncio
import contextlib
import io
import stat
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from serving.arrival import arrive
from serving.command.keys import main as tdm_keys
from serving.config import ModelSource, ServerConfig
from serving.errors import APIError
from serving.fronts import access
from serving.fronts.access import Access, APIKey, Bucket, Caller, hash_key, load_keys, save_keys
from serving.fronts.idempotency import Replays, seed_of
from serving.fronts.services import Services
from serving.images.local import ImageService
from serving.schema.image_request import order_from_fields
from serving.telemetry.metrics import ServerMetrics
from serving.web.app import build_app
from serving.web.generation import accepted_formats
from serving.web.http_edge import OPEN_PATHS
from serving.web.image_routes import MEDIA_TYPES
from tdm_runtime.errors import DeadlineError
from tdm_runtime.model.artifacts import BackendConfig
from tdm_runtime.model.decoder import Pixels
from tdm_runtime.safety import BlockedWords, Safety

BODY = {"prompt": "a cat", "size": "16x16", "num_inference_steps": 2}
PATH = "/v1/images/generations"
COST = 16 * 16 * 2 / 1e6


@pytest.fixture(scope="module")
def images(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ImageService]:
    backend = BackendConfig("torch", threads=1, device="cpu")
    state = tmp_path_factory.mktemp("state")
    config = ServerConfig(models=(ModelSource(tiny_checkpoint),), backend=backend, state_folder=state)
    service = ImageService(config, ServerMetrics())
    yield service
    service.close()


@contextlib.asynccontextmanager
async def connected(images: ImageService, **config: Any) -> AsyncIterator[tuple[httpx.AsyncClient, Services]]:
    """Yield a client of an application with these settings, and its services."""
    services = Services.start(replace(images.config, **config), ServerMetrics(), images)
    transport = httpx.ASGITransport(build_app(services), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
        yield client, services


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(test())


@pytest.fixture
def keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[Path, dict[str, str]]:
    """Write a key file with two keys. Returns the file and the key of each name."""
    file = tmp_path / "keys.json"
    made = {}
    for name, quota in (("ada", ["--requests-per-minute", "3"]), ("ben", ["--cost-per-minute", str(2.5 * COST)])):
        assert tdm_keys(["add", str(file), name, *quota]) == 0
        made[name] = capsys.readouterr().out.strip()
    return file, made


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


# -- keys ------------------------------------------------------------------------------------------


def test_the_key_file_has_only_hashes_and_only_its_owner_can_read_it(keys: tuple[Path, dict[str, str]]) -> None:
    file, made = keys
    assert not any(key in file.read_text() for key in made.values())
    assert {key.name: key.sha256 for key in load_keys(file)} == {name: hash_key(key) for name, key in made.items()}
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_keys_are_listed_and_removed(keys: tuple[Path, dict[str, str]], capsys: pytest.CaptureFixture[str]) -> None:
    file, _ = keys
    assert tdm_keys(["list", str(file)]) == 0
    assert "ada\t3 requests a minute" in capsys.readouterr().out
    assert tdm_keys(["add", str(file), "ada"]) == 2
    assert "has a key 'ada' already" in capsys.readouterr().err
    assert tdm_keys(["remove", str(file), "ada"]) == 0
    assert tdm_keys(["remove", str(file), "ada"]) == 2
    assert "has no key 'ada'; it has ben" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not json", "Invalid JSON"),
        ('[{"name": "a"}]', "sha256"),
        ('[{"name": "a b", "sha256": "' + "0" * 64 + '"}]', "name is 'a b'"),
        ('[{"name": "a", "sha256": "xyz"}]', "make a key with"),
        ('[{"name": "a", "sha256": "' + "0" * 64 + '", "cost_per_minute": -1}]', "cost_per_minute of a is -1"),
        (None, "tdm-keys add"),
    ],
)
def test_a_key_file_that_cannot_be_used_is_refused_at_start(tmp_path: Path, content: str | None, message: str) -> None:
    file = tmp_path / "keys.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=message):
        Access(file)


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Bearer wrong", "Basic abc", "bearer\tx"])
def test_without_a_key_only_open_paths_and_files_answer(
    images: ImageService, keys: tuple[Path, dict[str, str]], header: str | None
) -> None:
    async def test() -> None:
        async with connected(images, api_keys=keys[0]) as (client, _):
            headers = {} if header is None else {"authorization": header}
            paths = build_app(Services.start(images.config, ServerMetrics(), images)).openapi()["paths"]
            for path in (*paths, "/openapi.json", "/nowhere"):
                for method in paths.get(path, {"get": None}):
                    answer = await client.request(method, path.replace("{", "").replace("}", ""), headers=headers)
                    if path in OPEN_PATHS or path.startswith("/v1/files/"):
                        assert answer.status_code != 401
                        continue
                    assert answer.status_code == 401, path
                    error = answer.json()["error"]
                    assert "API key" in (error if path.startswith("/v2") else error["message"])
                    assert answer.headers["www-authenticate"] == "Bearer"
            for path in ("/health", "/v2/health/live", "/v2/health/ready"):  # Kubernetes has no key
                assert (await client.get(path, headers=headers)).status_code == 200

    run(test)


def test_a_key_is_valid_until_it_is_removed(
    images: ImageService, keys: tuple[Path, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, made = keys
    monkeypatch.setattr(access, "LOOK_AGAIN_S", 0.0)

    async def test() -> None:
        async with connected(images, api_keys=file) as (client, _):
            assert (await client.post(PATH, json=BODY, headers=bearer(made["ada"]))).status_code == 200
            tdm_keys(["remove", str(file), "ada"])
            assert (await client.post(PATH, json=BODY, headers=bearer(made["ada"]))).status_code == 401
            assert (await client.get("/v1/models", headers=bearer(made["ben"]))).status_code == 200
            file.write_text("spoiled")
            assert (await client.get("/v1/models", headers=bearer(made["ben"]))).status_code == 401

    run(test)


# -- quotas ----------------------------------------------------------------------------------------


def test_a_bucket_refills_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    monkeypatch.setattr(access.time, "monotonic", lambda: now_s)
    bucket = Bucket(6.0)
    assert bucket.wait_s(6.0) == 0
    bucket.take(6.0)
    assert bucket.wait_s(1.0) == pytest.approx(10.0)
    now_s += 10.0
    assert bucket.wait_s(1.0) == pytest.approx(0.0)
    now_s += 1e6
    assert bucket.wait_s(6.0) == 0
    assert bucket.wait_s(6.1) == float("inf")


def test_each_key_has_its_own_quotas(images: ImageService, keys: tuple[Path, dict[str, str]]) -> None:
    file, made = keys

    async def test() -> None:
        async with connected(images, api_keys=file) as (client, _):
            for key, allowed in ((made["ada"], 3), (made["ben"], 2)):
                for _ in range(allowed):
                    assert (await client.post(PATH, json=BODY, headers=bearer(key))).status_code == 200
                refused = await client.post(PATH, json=BODY, headers=bearer(key))
                assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
                assert 1 <= int(refused.headers["retry-after"]) <= 60
                assert "a minute" in refused.json()["error"]["message"]
            never = await client.post(PATH, json=BODY | {"n": 10}, headers=bearer(made["ben"]))
            assert (never.status_code, never.headers["x-should-retry"]) == (429, "false")
            assert "ask for fewer or smaller pictures" in never.json()["error"]["message"]
            assert (await client.post(PATH, json={"prompt": ""}, headers=bearer(made["ada"]))).status_code == 400

    run(test)


def test_a_request_that_exceeds_one_quota_takes_nothing_from_the_other() -> None:
    caller = Caller(APIKey("a", "0" * 64, requests_per_minute=2, cost_per_minute=1.0))
    for cost in (5.0, 5.0, 5.0):
        with pytest.raises(APIError, match="megapixel-steps"):
            caller.spend(cost)
    caller.spend(0.4)
    caller.spend(0.4)
    with pytest.raises(APIError, match="requests a minute"):
        caller.spend(0.0)


def test_more_open_requests_than_the_limit_are_refused(images: ImageService) -> None:
    async def test() -> None:
        async with connected(images, max_open_requests=4) as (client, _):
            answers = await asyncio.gather(*(client.post(PATH, json=BODY) for _ in range(20)))
            assert {answer.status_code for answer in answers} == {200, 429}
            refused = next(answer for answer in answers if answer.status_code == 429)
            assert refused.json()["error"]["code"] == "too_many_requests"
            assert "4 requests are open" in refused.json()["error"]["message"]

    run(test)


def test_the_time_since_arrival_counts_against_the_budget(images: ImageService) -> None:
    async def test() -> None:
        order = order_from_fields(BODY | {"latency_budget_ms": 8000}, images.recipe)
        arrive(ago_s=3.0)
        answer = await images.generate(order)
        assert 3000 < answer.timings.total_ms < 8000 and answer.latency_budget_kept
        assert answer.timings.queue_ms > 3000
        arrive(ago_s=9.0)
        with pytest.raises(DeadlineError):
            await images.generate(order)

    run(test)


def test_a_stopping_server_refuses_pictures_and_answers_health_and_metrics(images: ImageService) -> None:
    async def test() -> None:
        async with connected(images) as (client, services):
            services.is_draining = True
            assert (await client.post(PATH, json=BODY)).json()["error"]["code"] == "not_ready"
            assert (await client.get("/ready")).status_code == 503
            assert (await client.get("/health")).status_code == 200
            assert (await client.get("/metrics")).status_code == 200
            assert (await client.get("/v2/health/live")).json() == {"live": True}
            for path in ("/v2/health/ready", "/v2/models/tdm-emoji/ready"):
                answer = await client.get(path)
                assert answer.status_code == 503 and "its engine is not running" in answer.json()["error"]

    run(test)


# -- safety ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["a gun", "A GUN!", "\uff47\uff55\uff4e", "a  gún", "two g\u200bun s gun"])
def test_a_blocked_word_is_found_in_any_spelling(prompt: str) -> None:
    assert BlockedWords(["Gun", "", "big bomb"]).check_prompt(prompt) is not None


@pytest.mark.parametrize("prompt", ["a gunner", "begun", "a bomb", "a big red bomb"])
def test_words_that_contain_a_blocked_word_are_allowed(prompt: str) -> None:
    assert BlockedWords(["gun", "big bomb"]).check_prompt(prompt) is None


@pytest.mark.parametrize(
    ("word", "prompt"),
    [("血", "流血的狐狸"), ("🔫", "a cat🔫x"), ("銃", "猫と銃です"), ("ปืน", "แมวถือปืน")],
)
def test_a_blocked_word_without_spaces_around_it_is_found(word: str, prompt: str) -> None:
    assert BlockedWords([word]).check_prompt(prompt) is not None
    assert BlockedWords([word]).check_prompt("a fox, 狐狸") is None


class NoDark:
    """Safety checker that refuses every picture."""

    def check_prompt(self, prompt: str) -> str | None:
        return None

    def check_picture(self, pixels: Pixels) -> str | None:
        assert pixels.dtype == np.uint8
        return "darkness"


def test_refused_prompts_and_pictures_are_not_sent(
    images: ImageService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = tmp_path / "words"
    words.write_text("gun\n")
    config = replace(images.config, blocked_words=words, safety_checker="tests.serving.fronts.test_protection:NoDark")
    monkeypatch.setattr(images, "_safety", Safety.load(config.blocked_words, config.safety_checker))

    async def test() -> None:
        async with connected(images) as (client, _):
            for body, message in (({"prompt": "a gun"}, "the prompt holds a word"), ({}, "shows darkness")):
                refused = await client.post(PATH, json=BODY | body)
                assert (refused.status_code, refused.json()["error"]["code"]) == (400, "content_policy_violation")
                assert message in refused.json()["error"]["message"]
            streamed = await client.post(PATH, json=BODY | {"stream": True, "partial_images": 1})
            assert "b64_json" not in streamed.text
            assert "content_policy_violation" in streamed.text

    run(test)


@pytest.mark.parametrize(
    "name", ["nowhere:NoDark", "tests.serving.fronts.test_protection:Missing", "json:loads", "json"]
)
def test_a_checker_that_cannot_be_made_is_refused_at_start(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' cannot be made"):
        Safety.load(None, name)


# -- pictures as files -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("*/*", []),
        ("application/json", []),
        ("image/png", ["png"]),
        ("image/webp;q=0.5, image/jpeg", ["jpeg"]),
        ("application/json, image/png;q=0.9", []),
        ("text/html, image/png", ["png"]),
        ("image/png;q=x, image/webp", ["webp"]),
        ("image/png;q=0", []),
        ("image/gif, image/jpeg;q=0.8", ["jpeg"]),
        ("image/*", ["png", "webp", "jpeg"]),
        ("image/*, image/png;q=0", ["webp", "jpeg"]),
        ("image/*;q=0", []),
        ("", []),
    ],
)
def test_the_accept_header_chooses_the_format(accept: str, expected: list[str]) -> None:
    assert accepted_formats(accept, MEDIA_TYPES) == expected


def test_a_client_that_accepts_an_image_type_gets_the_picture_as_a_file(images: ImageService) -> None:
    async def test() -> None:
        async with connected(images) as (client, _):
            for image_format in ("png", "webp", "jpeg"):
                headers = {"accept": f"image/{image_format}"}
                answer = await client.post(PATH, json=BODY | {"seed": 7}, headers=headers)
                assert answer.headers["content-type"] == f"image/{image_format}"
                assert Image.open(io.BytesIO(answer.content)).format == image_format.upper()
                assert (answer.headers["x-tdm-seed"], answer.headers["x-tdm-num-inference-steps"]) == ("7", "2")
            for body in ({"n": 2}, {"stream": True}, {"output_format": "webp"}):
                refused = await client.post(PATH, json=BODY | body, headers={"accept": "image/png"})
                assert (refused.status_code, refused.json()["error"]["param"]) == (400, next(iter(body)))

    run(test)


# -- idempotency -----------------------------------------------------------------------------------


def test_a_repeated_request_gets_the_answer_of_the_first(images: ImageService) -> None:
    async def test() -> None:
        async with connected(images) as (client, _):
            headers = {"idempotency-key": "abc"}
            finished = images.engine.stats.finished
            answers = await asyncio.gather(*(client.post(PATH, json=BODY, headers=headers) for _ in range(5)))
            answers.append(await client.post(PATH, json=BODY, headers=headers))
            assert {answer.status_code for answer in answers} == {200}
            assert len({answer.content for answer in answers}) == 1
            assert images.engine.stats.finished == finished + 1
            other = await client.post(PATH, json=BODY | {"n": 2}, headers=headers)
            assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_key_reused")
            assert other.headers["x-should-retry"] == "false"
        async with connected(images) as (client, _):  # another replica, or this one after a restart
            again = await client.post(PATH, json=BODY, headers=headers)
            assert again.json()["data"][0]["b64_json"] == answers[0].json()["data"][0]["b64_json"]

    run(test)


@pytest.mark.parametrize("key", ["", "x" * 256, "a\tb"], ids=["empty", "too long", "not printable"])
def test_an_invalid_idempotency_key_is_refused(images: ImageService, key: str) -> None:
    async def test() -> None:
        async with connected(images) as (client, _):
            answer = await client.post(PATH, json=BODY, headers={"idempotency-key": key})
            assert answer.json()["error"]["code"] == "invalid_idempotency_key"

    run(test)


def test_failures_are_not_kept_and_callers_do_not_share_keys() -> None:
    from fastapi import Response

    async def test() -> None:
        replays, made = Replays(), []

        async def fail() -> Response:
            raise TimeoutError

        async def make() -> Response:
            made.append(1)
            return Response(b"x")

        with pytest.raises(TimeoutError):
            await replays.once("ada", "k", b"", fail)
        for caller in ("ada", "ben", "ada"):
            assert (await replays.once(caller, "k", b"", make)).body == b"x"
        assert len(made) == 2

    run(test)


def test_if_the_first_client_leaves_a_waiting_request_makes_the_answer() -> None:
    from fastapi import Response

    async def test() -> None:
        replays = Replays()
        never: asyncio.Future[Response] = asyncio.Future()

        async def wait() -> Response:
            return await never

        async def make() -> Response:
            return Response(b"made")

        first = asyncio.create_task(replays.once("ada", "k", b"", wait))
        await asyncio.sleep(0)
        second = asyncio.create_task(replays.once("ada", "k", b"", make))
        await asyncio.sleep(0)
        first.cancel()
        assert (await second).body == b"made"

    run(test)


def test_the_oldest_answers_are_dropped_when_the_memory_is_full() -> None:
    from fastapi import Response

    async def test() -> None:
        replays, made = Replays(max_bytes=25), []

        async def make() -> Response:
            made.append(1)
            return Response(b"x" * 10)

        for key in ("a", "b", "c", "d", "d", "a"):
            await replays.once("ada", key, b"", make)
        assert len(made) == 5  # d is still kept, a is not

    run(test)


def test_seeds_from_keys_are_distinct_and_repeatable() -> None:
    seeds = {seed_of("ada", str(n)) for n in range(1000)}
    assert len(seeds) == 1000 and max(seeds) < 2**32
    assert seed_of("ada", "1") == seed_of("ada", "1") != seed_of("ben", "1")


def test_saving_keys_replaces_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    save_keys(file, [APIKey("a", "0" * 64)])
    save_keys(file, [])
    assert load_keys(file) == [] and [entry.name for entry in tmp_path.iterdir()] == ["keys.json"]
