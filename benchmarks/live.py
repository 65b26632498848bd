"""`tdm-bench live`: draw a stroke and let pictures follow it, over the websocket and over HTTP.

A brush moves over a white canvas. Over the websocket every canvas is sent, and the server answers the newest. Over HTTP
the next canvas is sent when the one before is answered. Both take turns in one run. The latency of a picture counts
from sending its canvas.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from PIL import Image, ImageDraw

from benchmarks import options
from benchmarks.machine import environment_json, machine
from benchmarks.report import cell, markdown_table, write_json
from benchmarks.targets import EDIT_ROUTE, http_session, served_models
from benchmarks.workload import Size
from tdm_runtime.params import parse_size

LIVE_ROUTE = "/v1/images/live"
REPETITIONS = 3
BRUSH = 0.15
"""Width of the brush as a share of the shorter side."""
Stroke = Callable[[float], dict[str, Any]]
"""Returns the request whose canvas has the brush at a time in seconds since the stroke began."""


@dataclass
class Figures:
    """Pictures of one or more strokes."""

    latencies_ms: list[float] = field(default_factory=list)
    num_sent: int = 0
    span_s: float = 0.0

    def to_row(self) -> dict[str, float]:
        """Return pictures a second, percentiles of the latency in ms, and the share of canvases that got a picture."""
        cuts = statistics.quantiles(self.latencies_ms, n=100, method="inclusive")
        return {
            "pictures_per_s": len(self.latencies_ms) / self.span_s,
            "p50_ms": cuts[49],
            "p99_ms": cuts[98],
            "answered_share": len(self.latencies_ms) / self.num_sent,
        }


def stroke_of(size: Size, fields: dict[str, Any]) -> Stroke:
    """Return a stroke along the canvas. No two of its canvases are equal, so no encoded picture is used again."""
    width, height = size
    canvas = Image.new("RGB", size, "white")
    ink, radius = ImageDraw.Draw(canvas), BRUSH * min(size) / 2

    def request(at_s: float) -> dict[str, Any]:
        x, y = width * (at_s % 1.0), height * (0.2 + 0.6 * (at_s / 7.0 % 1.0))
        ink.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(200, int(255 * (at_s % 3.0) / 3.0), 40))
        file = io.BytesIO()
        canvas.save(file, "PNG", compress_level=1)
        return {**fields, "image": base64.b64encode(file.getvalue()).decode()}

    return request


async def over_websocket(
    session: aiohttp.ClientSession, base_url: str, stroke: Stroke, duration_s: float, period_s: float, found: Figures
) -> None:
    """Send every canvas and read pictures until the stroke ends."""
    sent_s: list[float] = []
    async with session.ws_connect(base_url + LIVE_ROUTE, max_msg_size=0) as socket:
        began_s = time.monotonic()

        async def read() -> None:
            async for message in socket:
                event = json.loads(message.data)
                if "error" in event:
                    raise ValueError(f"{base_url} refused: {event['error']['message']}")
                found.latencies_ms.append(1e3 * (time.monotonic() - sent_s[event["message"] - 1]))

        reading = asyncio.create_task(read())
        async for at_s in ticks(began_s, duration_s, period_s):
            if reading.done():
                break
            request = json.dumps(stroke(at_s))
            sent_s.append(time.monotonic())
            await socket.send_str(request)
        found.num_sent += len(sent_s)
        found.span_s += time.monotonic() - began_s
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=not reading.done())


async def over_http(
    session: aiohttp.ClientSession, base_url: str, stroke: Stroke, duration_s: float, period_s: float, found: Figures
) -> None:
    """Send the canvas of the moment whenever the request before is answered, at most one a period."""
    began_s = time.monotonic()
    async for at_s in ticks(began_s, duration_s, period_s):
        request = stroke(at_s)
        sent_s = time.monotonic()
        async with session.post(base_url + EDIT_ROUTE, json=request) as response:
            answer = await response.json()
            if response.status != 200:
                raise ValueError(f"{base_url} refused: {answer['error']['message']}")
        found.num_sent += 1
        found.latencies_ms.append(1e3 * (time.monotonic() - sent_s))
    found.span_s += time.monotonic() - began_s


async def ticks(began_s: float, duration_s: float, period_s: float) -> AsyncIterator[float]:
    """Yield the times of a stroke in seconds, each when it has come. Times that passed meanwhile are left out."""
    while (at_s := time.monotonic() - began_s) < duration_s:
        yield at_s
        now_s = time.monotonic() - began_s
        await asyncio.sleep(period_s - now_s % period_s)


Way = Callable[[aiohttp.ClientSession, str, Stroke, float, float, Figures], Awaitable[None]]
WAYS: dict[str, Way] = {"websocket": over_websocket, "http": over_http}


async def measure(given: argparse.Namespace) -> list[dict[str, Any]]:
    """Draw the strokes in turns.

    Returns:
        One row for each step count and way.
    """
    base_url = given.base_url.rstrip("/")
    cards = {card["id"]: card for card in await served_models(base_url)}
    if not cards or (given.model is not None and given.model not in cards):
        raise ValueError(f"{base_url} serves {', '.join(cards) or 'no models'}; --model names one of them")
    card = cards[given.model] if given.model else next(iter(cards.values()))
    size = parse_size(given.size or card["sizes"][0])
    found = {(steps, way): Figures() for steps in given.num_inference_steps for way in WAYS}
    async with http_session() as session:
        for (steps, way), figures in [*found.items()] * REPETITIONS:
            fields = {"model": card["id"], "prompt": given.prompt, "seed": 7, "size": f"{size[0]}x{size[1]}"}
            stroke = stroke_of(size, fields | {"num_inference_steps": steps, "strength": given.strength})
            duration_s = given.duration_s / REPETITIONS
            await WAYS[way](session, base_url, stroke, duration_s, 1.0 / given.message_rate, figures)
    return [{"num_inference_steps": steps, "way": way, **figures.to_row()} for (steps, way), figures in found.items()]


def main(arguments: list[str]) -> int:
    """Run the command. Returns the exit status."""
    given = _parser().parse_args(arguments)
    try:
        rows = asyncio.run(measure(given))
    except (aiohttp.ClientError, OSError, ValueError, statistics.StatisticsError) as error:
        print(f"tdm-bench live: {error}", file=sys.stderr)
        return options.USAGE_ERROR
    print(machine())
    print(markdown_table([*rows[0]], [[cell(value, 2) for value in row.values()] for row in rows]))
    if given.output is not None:
        write_json(given.output, {"environment": environment_json(), "strength": given.strength, "rows": rows})
    return 0


def _parser() -> options.Parser:
    parser = options.Parser(
        prog="tdm-bench live", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base-url", default="http://127.0.0.1:8000", help="address of the server (%(default)s)")
    parser.add_argument("--model", help="model id (default: the server's first)")
    parser.add_argument("--prompt", default="a red heart on a yellow background", help="prompt (%(default)s)")
    parser.add_argument("--size", help='size of canvas and picture, "WxH" (default: the model\'s)')
    parser.add_argument("--num-inference-steps", type=options.int_list, default=(1, 2, 4), help="step counts (1,2,4)")
    parser.add_argument("--strength", type=options.positive_float, default=0.5, help="as for edits (%(default)g)")
    parser.add_argument("--message-rate", type=options.positive_float, default=60.0, help="canvases a second (60)")
    parser.add_argument("--duration-s", type=options.positive_float, default=10.0, help="of each row (%(default)g)")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    return parser
