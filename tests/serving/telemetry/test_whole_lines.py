"""Lines of logs and traces stay whole when several threads and processes write at once."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

WRITERS = ("first", "second")
NUM_LINES = 300
"""Lines of each writer. Every tenth is longer than Python's buffer and than a pipe takes in one piece."""

START = f"""
import json, logging, sys, threading
from pathlib import Path
from serving.config import ServerConfig
from serving.telemetry.logs import set_up_logging, write_whole_lines
from serving.telemetry.tracing import Tracing, request_span
def messages(writer):
    for number in range({NUM_LINES}):
        yield "%s %d %s" % (writer, number, "x" * (20_000 if number % 10 == 0 else 100))
def log(writer):
    for message in messages(writer):
        logging.getLogger("serving.x").warning(message)
"""
WRITE_FILES = f"""{START}
writer, log_file, trace_file = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
config = ServerConfig(log_format="json", log_file=log_file, trace_file=trace_file)
set_up_logging(config)
tracing = Tracing.start(config)
print("ready", flush=True)
input()
log(writer)
for message in messages(writer):
    with request_span(tracing, {{}}, "POST") as span:
        span.set({{"message": message}})
tracing.close()
"""
PRINT_AND_LOG = f"""{START}
def show(writer, stream):  # as Ray's thread does with the lines of a replica
    for message in messages(writer):
        print(json.dumps({{"message": message}}), file=stream)
write_whole_lines()
set_up_logging(ServerConfig(log_format="json"))
own = threading.Thread(target=log, args=["own"])
theirs = [threading.Thread(target=show, args=[name, getattr(sys, name)]) for name in ("stdout", "stderr")]
for thread in (own, *theirs):
    thread.start()
for thread in (own, *theirs):
    thread.join()
"""


def parse(written: bytes) -> list[dict[str, object]]:
    """Return the complete lines. Each must be a JSON object."""
    return [json.loads(line) for line in written.split(b"\n")[:-1]]


def count(lines: list[dict[str, object]]) -> Counter[str]:
    """Return the number of lines of each writer. A writer numbers its lines 0, 1, ... in order."""
    found = Counter[str]()
    for line in lines:
        attributes = line.get("attributes")
        message = attributes["message"] if isinstance(attributes, dict) else line["message"]
        writer, number, filling = str(message).split()
        assert int(number) == found[writer] and filling == "x" * len(filling)
        found[writer] += 1
    return found


def test_processes_append_whole_lines_to_one_file(tmp_path: Path) -> None:
    """A reader finds whole lines up to the last line break, even while the processes write."""
    files = (tmp_path / "log", tmp_path / "traces")
    for file in files:
        file.touch()
    commands = [[sys.executable, "-c", WRITE_FILES, writer, *map(str, files)] for writer in WRITERS]
    processes = [subprocess.Popen(one, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for one in commands]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in processes:
        print(file=process.stdin, flush=True)
    while any(process.poll() is None for process in processes):
        for file in files:
            parse(file.read_bytes())
    assert [process.returncode for process in processes] == [0, 0]
    for file in files:
        assert file.read_bytes().endswith(b"\n")
        assert count(parse(file.read_bytes())) == dict.fromkeys(WRITERS, NUM_LINES)


def test_lines_of_the_replica_and_of_the_command_stay_whole_in_one_pipe() -> None:
    command = [sys.executable, "-c", PRINT_AND_LOG]
    ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=True)
    assert count(parse(ended.stdout)) == dict.fromkeys(("own", "stdout", "stderr"), NUM_LINES)
