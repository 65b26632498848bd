"""`python -m benchmarks.beside_clips`: does a picture keep its latency budget while clips are made back to back?

Clients make clips of one model without a pause. Another asks for pictures of a second model with a budget and "auto"
steps, first on the idle server and then beside the clips.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence

import aiohttp
import numpy as np

from benchmarks.machine import machine
from benchmarks.targets import OpenAITarget, http_session
from benchmarks.workload import Request

PROMPT = "a red heart"


async def clips_until(
    session: aiohttp.ClientSession, base_url: str, model: str, steps: int, stop: asyncio.Event
) -> list[float]:
    """Make clips one after the other until `stop` is set. Returns the seconds of each.

    Raises:
        RuntimeError: the server refuses a clip; the message has its reason.
    """
    seconds: list[float] = []
    while not stop.is_set():
        began_s = time.perf_counter()
        body = {"model": model, "prompt": PROMPT, "seed": len(seconds), "num_inference_steps": steps}
        async with session.post(f"{base_url}/v1/videos/generations", json=body) as answer:
            content = await answer.text()
        if answer.status != 200:
            raise RuntimeError(f"a clip of {model} got {answer.status}: {content[:300]}")
        seconds.append(time.perf_counter() - began_s)
    return seconds


async def pictures(target: OpenAITarget, count: int, budget_ms: float, pause_s: float) -> str:
    """Ask for pictures with a budget and "auto" steps, one after the other. Returns what came of them, in words."""
    times_ms, steps, refusals = [], [], []
    for seed in range(count):
        sent_s = time.perf_counter()
        outcome = await target.send(Request(PROMPT, seed, "auto", latency_budget_ms=budget_ms))
        if outcome.error is None:
            times_ms.append(1e3 * (outcome.answered_s - sent_s))
            steps.append(outcome.steps_used or 0)
        else:
            refusals.append(outcome.error)
        await asyncio.sleep(pause_s)
    if not times_ms:
        return f"none of {count} was made: {refusals[0]}"
    p50, p99, most = np.percentile(times_ms, (50, 99, 100))
    kept = sum(ms <= budget_ms for ms in times_ms)
    return (
        f"{len(times_ms)} of {count} accepted, {kept} back within {budget_ms:g} ms by the client's clock; "
        f"p50 {p50:.0f} ms, p99 {p99:.0f} ms, most {most:.0f} ms; {np.mean(steps):.2f} steps on average"
    )


async def measure(given: argparse.Namespace) -> None:
    """Run both phases against a server and print what happened."""
    print(machine())
    async with http_session() as session:
        target = OpenAITarget(session, given.base_url, model=given.picture_model)
        await pictures(target, 5, 60_000, 0)  # the first pictures of a server take longer
        alone = await pictures(target, given.pictures, given.budget_ms, given.pause_s)
        print(f"pictures on the idle server: {alone}")
        stop = asyncio.Event()
        clips = [
            asyncio.create_task(clips_until(session, given.base_url, given.clip_model, given.clip_steps, stop))
            for _ in range(given.clips)
        ]
        await asyncio.sleep(1)
        beside = await pictures(target, given.pictures, given.budget_ms, given.pause_s)
        stop.set()
        seconds = [one for made in await asyncio.gather(*clips) for one in made]
        print(f"pictures beside clips: {beside}")
        print(f"{len(seconds)} clips of {given.clip_steps} steps, {np.median(seconds):.2f} s each (median)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.beside_clips", description=__doc__)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000", help="of the server (%(default)s)")
    parser.add_argument("--clip-model", default="tdm-emoji-video", help="model of the clips (%(default)s)")
    parser.add_argument("--picture-model", default="tdm-emoji", help="model of the pictures (%(default)s)")
    parser.add_argument("--clips", type=int, default=1, help="clips that are made at any time (%(default)s)")
    parser.add_argument("--clip-steps", type=int, default=4, help="steps of a clip (%(default)s)")
    parser.add_argument("--pictures", type=int, default=100, help="pictures of each phase (%(default)s)")
    parser.add_argument("--budget-ms", type=float, default=200, help="budget of a picture (%(default)s)")
    parser.add_argument("--pause-s", type=float, default=0.1, help="pause between two pictures (%(default)s)")
    try:
        asyncio.run(measure(parser.parse_args(arguments)))
    except (RuntimeError, aiohttp.ClientError) as error:
        print(f"benchmarks.beside_clips: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
