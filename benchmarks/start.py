"""`tdm-bench start`: what a start costs, and a server that nobody uses.

Starts this server several times with what earlier starts left (compiled artifacts, measured backends) and measures the
time to /ready and to the first pictures; then, without requests, the CPU time and memory of all its processes.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks import options
from benchmarks.contenders import NotRunError, all_contenders, running
from benchmarks.machine import environment_json, machine
from benchmarks.report import cell, markdown_table, write_json
from benchmarks.targets import ROUTE, http_session

MIB = 2**20
ROLES = {"ray::ServeReplica": "replica", "serving.command.cli": "command"}
"""Part of a process's command line -> its role. Everything else is Ray's."""
RAY = "Ray"
Row = dict[str, float]


def measure(server_arguments: list[str], idle_s: float) -> Row:
    """Start a server once.

    Returns:
        Seconds to /ready; milliseconds of the first and the second picture; while idle, percent of a core and MiB of
        each role, where pages that several processes share are divided among them.

    Raises:
        NotRunError: it does not start.
        ValueError: it refuses a picture.
    """
    ours = all_contenders(server_arguments)[0]
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory() as logs, running(ours, Path(logs)) as base_url:
        row = {"ready_s": time.monotonic() - began_s}
        row |= asyncio.run(_first_pictures(base_url))
        time.sleep(min(idle_s, 2.0))  # what the pictures left to do
        before, began_s = _usage(), time.monotonic()
        time.sleep(idle_s)
        after, lasted_s = _usage(), time.monotonic() - began_s
    for role in (*ROLES.values(), RAY):
        row[f"{role}_idle_cpu_percent"] = 100 * (after[role][0] - before[role][0]) / lasted_s
        row[f"{role}_mib"] = after[role][1]
    return row


async def _first_pictures(base_url: str) -> Row:
    found: Row = {}
    async with http_session() as session:
        for name in ("first_picture_ms", "second_picture_ms"):
            began_s = time.monotonic()
            async with session.post(base_url + ROUTE, json={"prompt": "a red heart", "seed": len(found)}) as response:
                if response.status != 200:
                    raise ValueError(f"the first picture was refused: {await response.text()}")
                await response.read()
            found[name] = 1e3 * (time.monotonic() - began_s)
    return found


def _usage() -> Mapping[str, tuple[float, float]]:
    """Return the CPU seconds and the MiB of the processes that this one started, by role."""
    import psutil

    found: defaultdict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
    for process in psutil.Process().children(recursive=True):
        try:
            line, times, memory = " ".join(process.cmdline()), process.cpu_times(), process.memory_full_info()
        except psutil.NoSuchProcess:
            continue
        role = next((role for part, role in ROLES.items() if part in line), RAY)
        seconds, mib = found[role]
        found[role] = seconds + times.user + times.system, mib + memory.pss / MIB
    return found


def main(arguments: list[str]) -> int:
    """Run the command. Returns the exit status."""
    given = _parser().parse_args(arguments)
    try:
        rows = [measure(given.server_args.split(), given.idle_s) for _ in range(given.repetitions)]
    except (NotRunError, aiohttp.ClientError, OSError, ValueError) as error:
        print(f"tdm-bench start: {error}", file=sys.stderr)
        return options.USAGE_ERROR
    found = {name: [row[name] for row in rows] for name in rows[0]}
    table = [[name, cell(statistics.median(them)), cell(min(them)), cell(max(them))] for name, them in found.items()]
    print(machine())
    print(markdown_table(["figure", "median", "least", "most"], table))
    if given.output is not None:
        result: dict[str, Any] = {"environment": environment_json(), "server_args": given.server_args, "starts": rows}
        write_json(given.output, result)
    return 0


def _parser() -> options.Parser:
    parser = options.Parser(
        prog="tdm-bench start", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--server-args", default="", help="arguments of the server, as one string")
    parser.add_argument("--repetitions", type=options.positive_int, default=3, help="number of starts (%(default)s)")
    parser.add_argument("--idle-s", type=options.positive_float, default=20.0, help="idle time measured (%(default)g)")
    parser.add_argument("--output", type=Path, help="JSON file for the figures of each start")
    return parser
