"""Who arrives with many gets its turn; what is ready is answered between them; and waiting counts."""

from __future__ import annotations

import asyncio
import time

from serving.arrival import Turnstile, arrive, since_arrival_s


def test_one_passes_a_turn_of_the_loop_in_the_order_of_arrival() -> None:
    """A callback that is ready meanwhile, as an answer is, comes after the first and not after the last."""
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


def test_who_leaves_the_queue_holds_up_nobody() -> None:
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


def test_a_request_is_as_old_as_its_task_and_those_that_it_starts() -> None:
    async def run() -> None:
        assert since_arrival_s() == 0.0, "nobody's request"

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
