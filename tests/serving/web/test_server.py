"""A real server over HTTP and with the official client: pictures, errors, a client that leaves, overload."""

from __future__ import annotations

import base64
import io
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from serving.config import ServerConfig
from tdm_runtime.checkpoint.folder import DEFAULT_CHECKPOINT
from tdm_runtime.media.image_file import encode_image
from tdm_runtime.model.artifacts import BackendConfig
from tdm_runtime.model.choice import MIN_PSNR_DB, load_model
from tdm_runtime.model.loaded_model import LoadedModel
from tdm_runtime.model.similarity import psnr_db
from tdm_runtime.params import DecoderName, SamplingParams
from tdm_runtime.pipeline import generate
from tests.serving.conftest import RunningServer

PICTURE_TOLERANCE = 2
"""Largest difference, in levels of 255, that batching may make."""
BACKEND_LINE = re.compile(r"^backend: (\S+) (\S+) with (\d+) threads?, (\S+) ms a picture( \(.*\))?$", re.MULTILINE)
"""Line that `tdm-serve` prints after it measured: backend, precision, threads, milliseconds, other candidates."""


@pytest.fixture(scope="module", autouse=True)
def silent_client(server: RunningServer) -> Iterator[socket.socket]:
    """Sends a part of a body and no more; the server's time for it runs while the other tests do."""
    head = b"POST /v1/images/generations HTTP/1.1\r\nHost: a\r\nContent-Length: 50\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=ServerConfig.body_timeout_s + 20) as connection:
        connection.sendall(head + b'{"prompt"')
        yield connection


def picture_of(b64_json: str | None) -> Image.Image:
    assert b64_json is not None
    return Image.open(io.BytesIO(base64.b64decode(b64_json)))


def metric(http: httpx.Client, name: str) -> float:
    """Return the sum of a metric over its labels."""
    values = re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", http.get("/metrics").text, re.MULTILINE)
    return sum(map(float, values))


@pytest.fixture(scope="module")
def served(server: RunningServer) -> LoadedModel:
    """Return the model on the backend and with the number of threads that the server chose."""
    found = BACKEND_LINE.search(server.log.read_text())
    assert found is not None
    backend, precision, threads = found[1], found[2], int(found[3])
    config = BackendConfig(backend, precision, threads, device="cpu")  # type: ignore[arg-type]
    return load_model(DEFAULT_CHECKPOINT, config)


def test_the_official_client_gets_the_picture_that_the_reference_makes(
    client: openai.OpenAI, served: LoadedModel
) -> None:
    answer = client.images.generate(
        model="tdm-emoji", prompt="a red heart", extra_body={"seed": 7, "num_inference_steps": 4}
    )
    assert answer.data is not None
    picture = picture_of(answer.data[0].b64_json)
    expected = generate(served, SamplingParams("a red heart", 7, 4, 64, 64))
    assert np.abs(np.asarray(picture).astype(int) - expected).max() <= PICTURE_TOLERANCE
    assert "Seed: 7" in picture.text["parameters"]  # type: ignore[attr-defined]
    assert answer.size == "64x64"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_the_chosen_backend_makes_nearly_the_pictures_of_torch(
    client: openai.OpenAI, model: LoadedModel, steps: int
) -> None:
    answer = client.images.generate(prompt="a red heart", extra_body={"seed": 7, "num_inference_steps": steps})
    assert answer.data is not None
    picture = np.asarray(picture_of(answer.data[0].b64_json))
    assert psnr_db(picture, generate(model, SamplingParams("a red heart", 7, steps, 64, 64))) >= MIN_PSNR_DB


def test_the_start_logs_the_backend_and_the_others_that_were_measured(
    server: RunningServer, served: LoadedModel
) -> None:
    (line,) = BACKEND_LINE.finditer(server.log.read_text())
    assert f"{line[1]} {line[2]}" == served.backend
    assert float(line[4]) > 0
    if served.backend != "torch fp32":
        assert re.search(r"torch fp32 \S+ ms", line[5])


def test_the_model_card_has_backend_and_parity(http: httpx.Client, served: LoadedModel) -> None:
    (card,) = http.get("/v1/models").json()["data"]
    assert card == http.get("/v1/models/tdm-emoji").json()
    assert card["backend"] == served.backend
    assert card["decoders"] == list(served.decoders)
    assert card["parity_psnr_db"] == {str(k): round(found.psnr_db, 1) for k, found in served.parity.items()}
    if served.backend != "torch fp32":
        assert list(card["parity_psnr_db"]) == ["1", "2", "3", "4"]
        assert min(card["parity_psnr_db"].values()) >= MIN_PSNR_DB


@pytest.mark.parametrize("decoder", ["full", "tiny"])
def test_a_picture_is_decoded_by_the_requested_decoder(
    http: httpx.Client, served: LoadedModel, decoder: DecoderName
) -> None:
    body = {"prompt": "a red heart", "seed": 7, "num_inference_steps": 2, "decoder": decoder}
    answer = http.post("/v1/images/generations", json=body)
    if decoder not in served.decoders:
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "decoder"
        assert "decoder is 'tiny'; tdm-emoji has full" in answer.json()["error"]["message"]
        return
    picture = np.asarray(picture_of(answer.json()["data"][0]["b64_json"]))
    expected = {name: generate(served, SamplingParams("a red heart", 7, 2, 64, 64, name)) for name in served.decoders}
    assert np.abs(picture.astype(int) - expected[decoder]).max() <= PICTURE_TOLERANCE
    for name in set(served.decoders) - {decoder}:
        assert np.abs(picture.astype(int) - expected[name]).max() > PICTURE_TOLERANCE


def test_an_unknown_decoder_is_refused_by_name(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(prompt="a cat", extra_body={"decoder": "jpeg"})
    assert caught.value.param == "decoder"
    assert "'jpeg'" in caught.value.message and "'full' or 'tiny'" in caught.value.message


def test_the_official_client_lists_the_model(client: openai.OpenAI) -> None:
    (card,) = client.models.list().data
    assert card.id == "tdm-emoji"
    assert client.models.retrieve("tdm-emoji").id == "tdm-emoji"
    with pytest.raises(openai.NotFoundError, match="tdm-emoji"):
        client.models.retrieve("dall-e-3")


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_every_step_count_is_served_and_reported(client: openai.OpenAI, steps: int) -> None:
    answer = client.images.generate(prompt="a cat", extra_body={"num_inference_steps": steps})
    body = answer.model_dump()
    assert len(body["timings"]["steps_ms"]) == steps
    assert body["data"][0]["num_inference_steps"] == steps
    assert 0 <= body["data"][0]["seed"] < 2**32


def test_n_pictures_differ_and_each_matches_its_seed(client: openai.OpenAI) -> None:
    several = client.images.generate(prompt="a dog", n=3, extra_body={"seed": 10}).data or []
    (last,) = client.images.generate(prompt="a dog", extra_body={"seed": 12}).data or []
    pictures = [np.asarray(picture_of(image.b64_json)).astype(int) for image in (*several, last)]
    assert np.abs(pictures[2] - pictures[3]).max() <= PICTURE_TOLERANCE
    assert np.abs(pictures[0] - pictures[1]).max() > PICTURE_TOLERANCE


@pytest.mark.parametrize("image_format", ["png", "webp", "jpeg"])
def test_every_format_has_its_own_file_type(client: openai.OpenAI, image_format: Any) -> None:
    answer = client.images.generate(prompt="a cat", output_format=image_format, extra_body={"seed": 1})
    assert answer.data is not None
    assert picture_of(answer.data[0].b64_json).format == image_format.upper()


def test_a_truncated_prompt_gives_a_warning(http: httpx.Client) -> None:
    body = http.post("/v1/images/generations", json={"prompt": "a red heart and " * 40}).json()
    assert "tokens" in body["warnings"][0]


def test_errors_raise_the_official_clients_typed_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(prompt="a cat", size="1024x1024")
    assert caught.value.param == "size"
    assert "64x64" in caught.value.message
    with pytest.raises(openai.NotFoundError):
        client.images.generate(prompt="a cat", model="dall-e-3")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("PUT", "/v1/models", 405),
        ("GET", "/v1/images/generations", 405),
        ("GET", "/playground/static/../../config.py", 404),
        ("GET", "/playground/static/%2e%2e/%2e%2e/config.py", 404),
        ("GET", "/v1/models/..%2fx", 404),
    ],
)
def test_an_unknown_path_or_method_is_an_error_in_the_shape_of_the_api(
    http: httpx.Client, method: str, path: str, status: int
) -> None:
    answer = http.request(method, path)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert answer.headers["x-request-id"]


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"x" * (ServerConfig.max_body_bytes + 1), {}, 413),
        (b'{"prompt": "' + b"x" * (10 * 2**20) + b'"}', {}, 413),
        (b"{}", {"content-type": "text/plain"}, 415),
        (b"{}", {"content-encoding": "gzip"}, 415),
        (b"", {}, 400),
        (b'{"prompt": "a", "prompt": "b"}', {}, 400),
        (b"[" * 60000, {}, 400),
        (b"\xff\xfe", {}, 400),
        (b'{"prompt": "\\ud800"}', {}, 400),
    ],
)
def test_hostile_bodies_are_refused(http: httpx.Client, content: bytes, headers: dict[str, str], status: int) -> None:
    answer = http.post(
        "/v1/images/generations", content=content, headers={"content-type": "application/json", **headers}
    )
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


def test_a_chunked_flood_is_cut_off(http: httpx.Client) -> None:
    def flood() -> Any:
        for _ in range(10_000):
            yield b" " * 1024

    try:
        answer = http.post("/v1/images/generations", content=flood(), headers={"content-type": "application/json"})
    except httpx.TransportError:
        return  # cut off while sending is as good as a 413
    assert answer.status_code == 413


@pytest.mark.parametrize(
    "raw",
    [
        b"POST /v1/images/generations HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/images/generations HTTP/1.1\r\nHost: a\r\nContent-Length: nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX-Big: " + b"x" * 200_000 + b"\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
)
def test_broken_http_does_not_disturb_others(server: RunningServer, http: httpx.Client, raw: bytes) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        try:
            connection.sendall(raw)
            answered = connection.recv(4096)
        except (ConnectionError, TimeoutError):
            answered = b""
    assert not answered.startswith(b"HTTP/1.1 5")
    assert http.get("/ready").status_code == 200


def test_a_body_that_never_arrives_times_out(silent_client: socket.socket) -> None:
    answer = silent_client.recv(65536)
    assert b" 408 " in answer.split(b"\r\n")[0]


def test_the_request_of_a_client_that_leaves_is_cancelled(server: RunningServer, http: httpx.Client) -> None:
    """The client leaves when some pictures are being made. Where all were made by then, it tries again."""
    body = json.dumps({"prompt": "a cat", "n": 10}).encode()
    head = (
        f"POST /v1/images/generations HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode()
    for _ in range(5):
        before, made = metric(http, "tdm_cancelled_total"), metric(http, "tdm_pictures_total")
        leavers = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(3)]
        for leaver in leavers:
            leaver.sendall(head + body)
        deadline = time.monotonic() + 30
        while metric(http, "tdm_live_samples") == 0 and metric(http, "tdm_pictures_total") - made < 30:
            assert time.monotonic() < deadline, "no picture is being made"
        for leaver in leavers:
            leaver.close()
        while time.monotonic() < deadline:
            num_cancelled = metric(http, "tdm_cancelled_total") - before
            num_made = metric(http, "tdm_pictures_total") - made
            if metric(http, "tdm_live_samples") == 0 and (num_cancelled > 0 or num_made == 30):
                break
            time.sleep(0.05)
        if num_cancelled > 0:
            break
    assert metric(http, "tdm_live_samples") == 0
    assert num_cancelled > 0 and num_made < 30


def test_overload_is_refused_with_a_retry_time_and_nothing_else_fails(http: httpx.Client) -> None:
    """Of eight times the most live pictures (32), some are served and the others get 429."""

    def ask(seed: int) -> httpx.Response:
        return http.post("/v1/images/generations", json={"prompt": "a cat", "n": 8, "seed": seed})

    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(ask, range(32)))
    assert {answer.status_code for answer in answers} == {200, 429}
    for answer in answers:
        if answer.status_code == 429:
            assert int(answer.headers["retry-after"]) >= 1
            assert "32" in answer.json()["error"]["message"]


def test_concurrent_requests_share_denoiser_calls(http: httpx.Client) -> None:
    """How many share a call follows from what calls took in warm-up; on a busy machine that may be two."""
    calls, samples = metric(http, "tdm_batch_size_count"), metric(http, "tdm_batch_size_sum")
    barrier = threading.Barrier(4)

    def ask(steps: int) -> int:
        barrier.wait()
        body = {"prompt": "a cat", "n": 4, "num_inference_steps": steps}
        return http.post("/v1/images/generations", json=body).status_code

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(ask, [1, 2, 3, 4])) == {200}
    calls, samples = metric(http, "tdm_batch_size_count") - calls, metric(http, "tdm_batch_size_sum") - samples
    assert samples == 4 * (1 + 2 + 3 + 4)
    assert samples / calls > 1


def test_operations_endpoints_answer(http: httpx.Client) -> None:
    assert http.get("/health").json() == {"status": "ok"}
    assert http.get("/ready").json() == {"status": "ready", "live": 0, "max_live": 32}
    text = http.get("/metrics").text
    for name in ("queue", "text_encode", "denoise", "decode", "image_encode", "e2e"):
        assert f"tdm_{name}_seconds_bucket" in text


@pytest.mark.parametrize("path", ["/health", "/ready", "/v1/models", "/metrics", "/"])
def test_head_is_get_without_a_body(http: httpx.Client, path: str) -> None:
    head, get = http.head(path), http.get(path)
    assert (head.status_code, head.content) == (get.status_code, b"")
    assert head.headers["content-type"] == get.headers["content-type"]


def test_the_playground_loads_only_its_own_files(http: httpx.Client) -> None:
    page = http.get("/")
    assert page.status_code == 200
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert not re.search(r"""(?:src|href)=["']https?://""", page.text)
    for file in ("playground.js", "playground.css"):
        assert f"/playground/static/{file}" in page.text
        assert http.get(f"/playground/static/{file}").status_code == 200


def test_the_documented_body_has_the_fields_that_are_read(http: httpx.Client) -> None:
    operation = http.get("/openapi.json").json()["paths"]["/v1/images/generations"]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    assert schema["required"] == ["prompt"]
    assert "num_inference_steps" in schema["properties"]


def test_a_request_id_comes_back_once(http: httpx.Client) -> None:
    given = http.get("/health", headers={"x-request-id": "abc-123"})
    assert given.headers.get_list("x-request-id") == ["abc-123"]
    assert len(http.get("/health").headers.get_list("x-request-id")) == 1


def test_encoding_is_deterministic(model: LoadedModel) -> None:
    pixels = generate(model, SamplingParams("a cat", 1, 1, 64, 64))
    assert encode_image(pixels, "png", parameters="a") == encode_image(pixels, "png", parameters="a")
