"""`tdm-bench soak`: run a long mixed load and check that the server does not leak or fail.

Half of the visits ask for pictures, at 1 to 4 steps or auto, some with a latency budget. The others read streams,
leave streams early, cancel requests, send invalid requests or open a new connection. Memory, threads and open files
of the server come from its /metrics. If this command starts the server, the memory of all its processes is measured
too.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks import options
from benchmarks.contenders import NotRunError, all_contenders, running
from benchmarks.targets import ROUTE, http_session
from benchmarks.workload import BACKGROUNDS, SUBJECTS

MIB = 2**20
SERVER_ERROR, UNAVAILABLE = 500, 503
SETTLE_S = 30.0
"""Time after the load in which cancelled work must end."""
NONSENSE: tuple[dict[str, Any], ...] = (
    {},
    {"prompt": ""},
    {"prompt": "a cat", "size": "9x9"},
    {"prompt": "a cat", "num_inference_steps": 99},
    {"prompt": "a cat", "no_such_field": 1},
    {"prompt": "a cat", "latency_budget_ms": 0.01},
)


@dataclass(frozen=True)
class Bounds:
    """Allowed growth from the first to the last quarter after the warm-up."""

    memory_share: float = 0.03
    """Growth of memory as a share of the first quarter; `memory_mib` is allowed in addition."""
    memory_mib: float = 20.0
    threads: float = 4.0
    """The thread pool that encodes large pictures may still be growing."""
    open_files: float = 16.0
    """Connections count as files, and their number varies between samples."""


@dataclass(frozen=True)
class Look:
    """Resources of the server's process at one time."""

    at_s: float
    memory_mib: float
    threads: float
    open_files: float
    live: float
    """Number of pictures accepted but not yet answered."""
    all_memory_mib: float | None
    """Memory of all processes of the server; None if this command did not start it."""


@dataclass
class Diary:
    """Record of a run."""

    answers: Counter[str] = field(default_factory=Counter)
    """Visit and status -> count."""
    faults: Counter[str] = field(default_factory=Counter)
    looks: list[Look] = field(default_factory=list)

    def note(self, visit: str, status: int) -> None:
        """Count an answer. Any 5xx except 503 is a fault."""
        self.answers[f"{visit} {status}"] += 1
        if status >= SERVER_ERROR and status != UNAVAILABLE:
            self.faults[f"{visit} was answered {status}"] += 1


@dataclass(frozen=True)
class Row:
    """One quantity: its medians in the first and the last quarter, and its allowed growth."""

    name: str
    first: float
    last: float
    allowed: float

    @property
    def is_kept(self) -> bool:
        return self.last - self.first <= self.allowed


class Visitor:
    """Client that makes random visits."""

    def __init__(self, session: aiohttp.ClientSession, base_url: str, seed: int, diary: Diary) -> None:
        self._session = session
        self._base_url = base_url
        self._random = random.Random(seed)
        self._diary = diary
        self._visits = {
            self.make_picture: 50,
            self.watch_stream: 10,
            self.leave_stream: 10,
            self.give_up: 10,
            self.send_nonsense: 10,
            self.connect_anew: 10,
        }
        """Visit -> its share in percent."""

    async def stay(self, until_s: float) -> None:
        """Make visits until `until_s`, a time of `time.monotonic`."""
        while time.monotonic() < until_s:
            (visit,) = self._random.choices([*self._visits], [*self._visits.values()])
            try:
                await visit()
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                self._diary.faults[f"{visit.__name__}: {type(error).__name__}"] += 1
                await asyncio.sleep(0.1)  # do not flood a server that is down

    async def make_picture(self) -> None:
        """Ask for pictures: any step count, sometimes with a latency budget, sometimes several."""
        await self._post("make_picture", self._asked())

    async def watch_stream(self) -> None:
        """Read a stream to its end."""
        await self._post("watch_stream", self._asked() | {"n": 1, "stream": True, "partial_images": 2})

    async def leave_stream(self) -> None:
        """Close a stream after the first bytes."""
        body = self._asked() | {"n": 1, "stream": True, "partial_images": 3, "draft": True}
        async with self._session.post(self._base_url + ROUTE, json=body) as answer:
            await answer.content.readany()
            self._diary.note("leave_stream", answer.status)
            answer.close()

    async def give_up(self) -> None:
        """Cancel a request after a short time, usually before the answer."""
        try:
            async with asyncio.timeout(self._random.uniform(0.001, 0.03)):
                await self._post("give_up", self._asked() | {"n": 4})
        except TimeoutError:
            self._diary.answers["give_up"] += 1

    async def send_nonsense(self) -> None:
        await self._post("send_nonsense", self._random.choice(NONSENSE))

    async def connect_anew(self) -> None:
        """Open a new connection and close it after one answer."""
        path = self._random.choice(("/v1/models", "/health", "/", "/nowhere"))
        async with http_session() as own, own.get(self._base_url + path, headers={"connection": "close"}) as answer:
            await answer.read()
            self._diary.note("connect_anew", answer.status)

    def _asked(self) -> dict[str, Any]:
        draw = self._random
        number = draw.randrange(5000)  # mostly a fresh prompt, sometimes a known one, so the text cache turns over
        asked: dict[str, Any] = {
            "prompt": f"a {draw.choice(SUBJECTS)} on {draw.choice(BACKGROUNDS)}, number {number}",
            "num_inference_steps": draw.choice((1, 2, 3, 4, "auto")),
            "n": draw.choice((1, 1, 1, 3)),
            "output_format": draw.choice(("png", "png", "webp", "jpeg")),
        }
        if draw.random() < 0.3:
            asked["latency_budget_ms"] = draw.choice((20, 100, 1000))
        return asked

    async def _post(self, visit: str, body: dict[str, Any]) -> None:
        async with self._session.post(self._base_url + ROUTE, json=body) as answer:
            await answer.read()
            self._diary.note(visit, answer.status)


# -- sampling ----------------------------------------------------------------------------------


async def look(session: aiohttp.ClientSession, base_url: str, at_s: float, is_ours: bool) -> Look:
    """Read the resources of the server from /metrics.

    Raises:
        ValueError: a metric is missing, because the server is not a tdm-serve or does not run on Linux.
    """
    async with session.get(f"{base_url}/metrics") as answer:
        text = await answer.text()
    found = dict(re.findall(r"^(\w+) (\S+)$", text, re.MULTILINE))
    names = ("process_resident_memory_bytes", "tdm_threads", "process_open_fds", "tdm_live_samples")
    if missing := [name for name in names if name not in found]:
        raise ValueError(f"{base_url}/metrics lacks {', '.join(missing)}; the soak needs a tdm-serve on Linux")
    memory, threads, files, live = (float(found[name]) for name in names)
    return Look(at_s, memory / MIB, threads, files, live, _all_memory_mib() if is_ours else None)


def _all_memory_mib() -> float:
    """Return the memory of all child processes; pages shared by several processes count several times."""
    import psutil

    total = 0
    for process in psutil.Process().children(recursive=True):
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total / MIB


async def soak(base_url: str, given: argparse.Namespace, is_ours: bool) -> Diary:
    """Load a server for `given.duration_s`, sample it every `given.sample_s`, then wait until it is idle."""
    diary = Diary()
    async with http_session() as session:
        await look(session, base_url, 0.0, is_ours)  # fail before any load if the server is not a tdm-serve
        started_s = time.monotonic()
        until_s = started_s + given.duration_s
        async with asyncio.TaskGroup() as visitors:
            for number in range(given.max_concurrency):
                visitor = Visitor(session, base_url, given.seed + number, diary)
                visitors.create_task(visitor.stay(until_s))
            while (now_s := time.monotonic()) < until_s:
                try:
                    diary.looks.append(await look(session, base_url, now_s - started_s, is_ours))
                except (aiohttp.ClientError, TimeoutError, OSError) as error:
                    diary.faults[f"/metrics: {type(error).__name__}"] += 1
                await asyncio.sleep(min(given.sample_s, max(0.0, until_s - time.monotonic())))
        settled_s = time.monotonic() + SETTLE_S
        while (live := (await look(session, base_url, 0.0, False)).live) and time.monotonic() < settled_s:
            await asyncio.sleep(0.2)
    if live:
        diary.faults[f"{live:g} pictures are still live {SETTLE_S:g} s after the load"] += 1
    return diary


# -- reporting ----------------------------------------------------------------------------------


def compare(looks: Sequence[Look], warm_up: float, bounds: Bounds) -> list[Row]:
    """Compare the medians of the first and the last quarter after the warm-up.

    Args:
        warm_up: share of the run that is warm-up, 0 to 1.

    Raises:
        ValueError: there are too few samples to compare.
    """
    end_s = max((one.at_s for one in looks), default=0.0)
    warm = [one for one in looks if one.at_s >= warm_up * end_s]
    quarter = len(warm) // 4
    if not quarter:
        raise ValueError(
            f"{len(warm)} samples after the warm-up; at least 4 are needed: raise --duration-s or lower --sample-s"
        )

    def row(name: str, text: str, share: float, allowed: float) -> Row:
        first, last = (
            statistics.median(getattr(one, name) for one in part) for part in (warm[:quarter], warm[-quarter:])
        )
        return Row(text, first, last, allowed + share * first)

    rows = [
        row("memory_mib", "memory, MiB", bounds.memory_share, bounds.memory_mib),
        row("threads", "threads", 0.0, bounds.threads),
        row("open_files", "open files", 0.0, bounds.open_files),
    ]
    if all(one.all_memory_mib is not None for one in warm):
        rows.append(row("all_memory_mib", "all processes, MiB", bounds.memory_share, bounds.memory_mib))
    return rows


def table(rows: Sequence[Row]) -> str:
    """Return the rows as a table for the terminal."""
    lines = [f"{'':20}{'first quarter':>15}{'last quarter':>15}{'growth':>10}{'allowed':>10}"]
    for row in rows:
        figures = f"{row.first:15.1f}{row.last:15.1f}{row.last - row.first:+10.1f}{row.allowed:+10.1f}"
        lines.append(f"{row.name:20}{figures}{'' if row.is_kept else '  too much'}")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Run the command. Returns 0 if the server is steady, 1 if it grew too much or failed, 2 for a usage error."""
    given = _parser().parse_args(arguments)
    bounds = Bounds(given.max_growth_percent / 100, given.max_growth_mib)
    try:
        with _server(given) as base_url:
            diary = asyncio.run(soak(base_url, given, is_ours=given.base_url is None))
        rows = compare(diary.looks, given.warm_up, bounds)
    except (NotRunError, aiohttp.ClientError, OSError, ValueError) as error:
        print(f"tdm-bench soak: {error}", file=sys.stderr)
        return options.USAGE_ERROR
    for what, count in sorted(diary.answers.items()):
        print(f"{count:8} {what}")
    print(table(rows))
    for fault, count in sorted(diary.faults.items()):
        print(f"{count:8} {fault}")
    is_well = not diary.faults and all(row.is_kept for row in rows)
    print("the server is steady" if is_well else "the server is not steady, see above")
    return 0 if is_well else 1


@contextmanager
def _server(given: argparse.Namespace) -> Iterator[str]:
    if given.base_url is not None:
        yield given.base_url.rstrip("/")
        return
    ours = all_contenders(given.server_args.split())[0]
    with tempfile.TemporaryDirectory() as logs, running(ours, Path(logs)) as base_url:
        yield base_url


def _parser() -> options.Parser:
    parser = options.Parser(
        prog="tdm-bench soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base-url", help="address of a running server (default: start one and stop it at the end)")
    parser.add_argument("--server-args", default="", help="arguments of the server that is started, as one string")
    parser.add_argument(
        "--duration-s", type=options.positive_float, default=1800.0, help="length of the load (%(default)g)"
    )
    parser.add_argument(
        "--sample-s", type=options.positive_float, default=5.0, help="time between samples (%(default)g)"
    )
    parser.add_argument(
        "--max-concurrency", type=options.positive_int, default=8, help="number of clients (%(default)s)"
    )
    parser.add_argument(
        "--warm-up", type=float, default=0.2, help="share of the run to skip as warm-up, 0 to 1 (%(default)g)"
    )
    parser.add_argument(
        "--max-growth-percent",
        type=float,
        default=100 * Bounds.memory_share,
        help="allowed growth of memory (%(default)g)",
    )
    parser.add_argument(
        "--max-growth-mib",
        type=float,
        default=Bounds.memory_mib,
        help="allowed in addition to the percentage (%(default)g)",
    )
    parser.add_argument("--seed", type=options.whole_number, default=0, help="seed of the visits (%(default)s)")
    return parser
