"""Requests that arrive together pass one at a time, ready answers come between them, and a request knows its age."""

from __future__ import annotations

import asyncio
import time

from serving.arrival import Turnstile, arrive, since_arrival_s


def test_one_request_passes_per_turn_of_the_loop_in_order_of_arrival() -> None:
    """A callback that becomes ready meanwhile, such as an answer, runs after the first request, not after the last."""
    happened: list[object] = []

    async def request(turnstile: Turnstile, number: int) -> None:
        await turnstile.passed()
        happened.append(number)
        if number == 0:
            asyncio.get_running_loop().call_soon(happened.append, "answer")

    async def run() -> None:
        turnstile = Turnstile()
        await asyncio.gather(*(request(turnstile, number) for number in range(5)))

    asyncio.run(run())
    assert [x for x in happened if x != "answer"] == list(range(5))
    assert happened.index("answer") == 1


def test_a_cancelled_request_does_not_block_the_others() -> None:
    passed: list[int] = []

    async def request(turnstile: Turnstile, number: int) -> None:
        await turnstile.passed()
        passed.append(number)

    async def run() -> None:
        turnstile = Turnstile()
        tasks = [asyncio.create_task(request(turnstile, number)) for number in range(4)]
        await asyncio.sleep(0)
        tasks[1].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(run())
    assert passed == [0, 2, 3]


def test_tasks_that_a_request_starts_have_its_age() -> None:
    async def run() -> None:
        assert since_arrival_s() == 0.0, "outside of a request"

        async def request(ago_s: float) -> float:
            arrive(ago_s)
            time.sleep(0.02)
            return await asyncio.create_task(age())

        async def age() -> float:
            return since_arrival_s()

        young, old = await asyncio.gather(asyncio.create_task(request(0.0)), asyncio.create_task(request(5.0)))
        assert young >= 0.02 and old - young > 4
        assert since_arrival_s() == 0.0

    asyncio.run(run())
