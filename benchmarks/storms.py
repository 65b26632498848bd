"""`python -m benchmarks.storms`: are promises kept when hundreds of clients come at once?

Each storm has new connections, "auto" steps and a latency budget, and comes after some idle seconds. Clients ask again
when they are answered, or at the time that a refusal names. With several servers the storms go to each in turn.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections import defaultdict
from collections.abc import Sequence

from benchmarks import options
from benchmarks.load import Record, Recording, closed_loop
from benchmarks.report import markdown_table
from benchmarks.targets import OpenAITarget, http_session
from benchmarks.workload import Workload

COLUMNS = ("server", "budget, ms", "pictures in a storm", "budgets kept", "of those asked in the first second")


async def storm(base_url: str, clients: int, duration_s: float, budget_ms: float) -> list[Record]:
    """Run one storm. Returns the records of all pictures."""
    recording, workload = Recording(), Workload(0, ("auto",), latency_budget_ms=budget_ms, tag=f"{time.time_ns()}")
    async with http_session() as session:
        await closed_loop(OpenAITarget(session, base_url), workload.requests(), clients, recording, duration_s)
    return [record for record in recording.records if record.is_completed]


def kept(pictures: Sequence[Record]) -> str:
    """Return the share of pictures whose budget was kept by the server's clock."""
    return f"{sum(one.outcome.is_budget_kept is True for one in pictures) / max(1, len(pictures)):.1%}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.storms", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--base-url", default="http://127.0.0.1:8000", help="of one or more servers (%(default)s)")
    parser.add_argument("--storms", type=options.positive_int, default=6, help="for each server (%(default)s)")
    parser.add_argument("--clients", type=options.positive_int, default=200, help="(%(default)s)")
    parser.add_argument("--duration-s", type=options.positive_float, default=2.0, help="of a storm (%(default)s)")
    parser.add_argument("--idle-s", type=options.positive_float, default=2.0, help="before a storm (%(default)s)")
    parser.add_argument("--latency-budget-ms", type=options.rate_list, default=(300.0, 500.0), help="a list (300,500)")
    given = parser.parse_args(arguments)
    made: defaultdict[tuple[str, float], list[list[Record]]] = defaultdict(list)
    for _ in range(given.storms):
        for budget_ms in given.latency_budget_ms:
            for url in given.base_url.split(","):
                time.sleep(given.idle_s)
                pictures = asyncio.run(storm(url, given.clients, given.duration_s, budget_ms))
                made[url, budget_ms].append(pictures)
                print(f"{url}, {budget_ms:g} ms: {len(pictures)} pictures, budgets kept {kept(pictures)}", flush=True)
    rows = []
    for (url, budget_ms), storms in sorted(made.items()):
        pictures = [one for each in storms for one in each]
        early = [one for one in pictures if one.sent_s < 1]
        rows.append([url, f"{budget_ms:g}", f"{len(pictures) / len(storms):.0f}", kept(pictures), kept(early)])
    print(markdown_table(COLUMNS, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
