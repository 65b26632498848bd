"""Small server of the images API around our engine, in this process or in its own."""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web

from tdm_runtime.engine.delivery import Delivery
from tdm_runtime.engine.engine import DiffusionEngine
from tdm_runtime.errors import InvalidRequestError, OverloadedError
from tdm_runtime.media.image_file import encode_image
from tdm_runtime.model.artifacts import BackendConfig
from tdm_runtime.model.choice import load_model
from tdm_runtime.params import SamplingParams


@dataclass
class SmallServer:
    """Server of one engine."""

    engine: DiffusionEngine
    base_url: str = ""
    answered: int = 0

    async def generate(self, request: web.Request) -> web.Response:
        body = await request.json()
        recipe = self.engine.model.recipe
        steps, fewest = body.get("num_inference_steps", recipe.default_steps), None
        if steps == "auto":
            steps, fewest = max(recipe.step_counts), 1
        width, height = map(int, body["size"].split("x")) if "size" in body else recipe.native_sizes[0]
        try:
            params = SamplingParams(body["prompt"], body["seed"], steps, width, height)
            picture = await asyncio.wrap_future(
                self.engine.submit(params, Delivery(body.get("latency_budget_ms"), fewest))
            )
        except InvalidRequestError as error:
            return web.json_response({"error": {"message": str(error), "code": error.code}}, status=400)
        except OverloadedError as error:
            return web.json_response({"error": {"message": str(error), "code": "queue_full"}}, status=429)
        png = base64.b64encode(encode_image(picture.pixels, "png")).decode()
        timings = {**vars(picture.timings), "encode_ms": 0.0}
        timings["total_ms"] = sum(timings["steps_ms"]) + timings["queue_ms"] + timings["text_ms"] + timings["decode_ms"]
        self.answered += 1
        data = [{"b64_json": png, "num_inference_steps": picture.params.num_inference_steps}]
        return web.json_response({"data": data, "timings": timings})

    async def models(self, _: web.Request) -> web.Response:
        model = self.engine.model
        return web.json_response({"data": [{"id": model.recipe.name, "backend": model.backend}]})

    async def health(self, _: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    def application(self) -> web.Application:
        app = web.Application()
        app.router.add_post("/v1/images/generations", self.generate)
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/health", self.health)
        return app


@contextmanager
def serving(engine: DiffusionEngine) -> Iterator[SmallServer]:
    """Run a server on its own thread."""
    server, loop, is_up = SmallServer(engine), asyncio.new_event_loop(), threading.Event()

    async def start() -> web.AppRunner:
        runner = web.AppRunner(server.application())
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        server.base_url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        is_up.set()
        return runner

    def run() -> None:
        asyncio.set_event_loop(loop)
        runner = loop.run_until_complete(start())
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())

    thread = threading.Thread(target=run)
    thread.start()
    assert is_up.wait(30)
    yield server
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def main() -> None:
    """Start as the peers of `tdm-bench compare` do."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--backend", required=True)
    parser.add_argument("--checkpoint", type=Path)
    given = parser.parse_args()
    if given.checkpoint is None:
        print(f"{given.backend} is not installed; install it", file=sys.stderr)
        sys.exit(3)
    with DiffusionEngine(load_model(given.checkpoint, BackendConfig(threads=1), device="cpu")) as engine:
        web.run_app(SmallServer(engine).application(), host="127.0.0.1", port=given.port, print=None)


if __name__ == "__main__":
    print(json.dumps({"starting": sys.argv[1:]}))
    main()
