"""`python -m benchmarks.burst`: is a lone client served again after a burst of clients with tight budgets?

Clients that ignore Retry-After ask for "auto" steps with a budget close to what a lone client needs. Afterwards a lone
client asks with the same budget: at once, after idle seconds, and after refusals alone.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Sequence

from benchmarks.targets import OpenAITarget, Outcome, Target, http_session
from benchmarks.workload import Request

PROMPT = "a red heart"
CALM_REQUESTS = 20
MAX_TRIES = 200


def asked(budget_ms: float) -> Request:
    """Return a request for as many steps as a budget allows."""
    return Request(PROMPT, seed=7, num_inference_steps="auto", latency_budget_ms=budget_ms)


async def lone_p50_ms(target: Target, steps: int) -> float:
    """Return the median time of a lone client, in milliseconds.

    Raises:
        RuntimeError: the server does not answer a request without a budget.
    """
    times_ms = []
    for _ in range(CALM_REQUESTS):
        sent_s = time.perf_counter()
        outcome = await target.send(Request(PROMPT, seed=7, num_inference_steps=steps))
        if outcome.error is not None:
            raise RuntimeError(f"a request without a budget got {outcome.error}; is the server ready?")
        times_ms.append(1e3 * (outcome.answered_s - sent_s))
    return statistics.median(times_ms)


async def burst(target: Target, clients: int, duration_s: float, budget_ms: float) -> list[Outcome]:
    """Run clients that ask again at once, refused or not. Returns the outcome of every request."""
    ends_s = time.monotonic() + duration_s

    async def client() -> list[Outcome]:
        outcomes = []
        while time.monotonic() < ends_s:
            outcomes.append(await target.send(asked(budget_ms)))
        return outcomes

    return [outcome for one in await asyncio.gather(*(client() for _ in range(clients))) for outcome in one]


async def served_after(target: Target, budget_ms: float) -> str:
    """Ask as a lone client until a request is accepted. Returns the number of tries and the time, in words."""
    began_s = time.monotonic()
    for tries in range(1, MAX_TRIES + 1):
        if (await target.send(asked(budget_ms))).error is None:
            return f"accepted at try {tries}, after {time.monotonic() - began_s:.2f} s"
        await asyncio.sleep(0.02)
    return f"refused {MAX_TRIES} times in {time.monotonic() - began_s:.2f} s"


async def measure(given: argparse.Namespace) -> None:
    """Run all phases against a server and print what happened."""
    async with http_session() as session:
        target = OpenAITarget(session, given.base_url)
        p50_ms = await lone_p50_ms(target, given.steps)
        budget_ms = given.budget_factor * p50_ms
        print(f"lone client, {given.steps} steps: p50 {p50_ms:.1f} ms; budget {budget_ms:.1f} ms")
        outcomes = await burst(target, given.clients, given.duration_s, budget_ms)
        accepted = [outcome for outcome in outcomes if outcome.error is None]
        missed = sum(outcome.is_budget_kept is False for outcome in accepted)
        print(f"burst of {given.clients} clients: {len(outcomes)} requests, {len(accepted)} pictures, {missed} late")
        print("lone client after the burst:", await served_after(target, budget_ms))
        await asyncio.sleep(given.idle_s)
        print(f"after {given.idle_s:g} idle seconds:", await served_after(target, budget_ms))
        refused = [outcome for outcome in await burst(target, 1, 1.0, 0.02 * p50_ms) if outcome.error is not None]
        print(f"after {len(refused)} refusals:", await served_after(target, budget_ms))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.burst", description=__doc__)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000", help="of the server (%(default)s)")
    parser.add_argument("--clients", type=int, default=16, help="clients in the burst (%(default)s)")
    parser.add_argument("--duration-s", type=float, default=4.0, help="length of the burst (%(default)s)")
    parser.add_argument("--steps", type=int, default=4, help="steps of the lone client (%(default)s)")
    parser.add_argument(
        "--budget-factor", type=float, default=1.56, help="budget as a multiple of the lone client's p50 (%(default)s)"
    )
    parser.add_argument("--idle-s", type=float, default=10.0, help="idle time after the burst (%(default)s)")
    try:
        asyncio.run(measure(parser.parse_args(arguments)))
    except RuntimeError as error:
        print(f"benchmarks.burst: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
