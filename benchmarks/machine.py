"""Description of the machine, printed above every table.

`python -m benchmarks.machine` prints it, and how long memory takes that was not used for a while. On some virtual
machines that is many times longer: requests after a pause are slow there, whatever serves them.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks.report import markdown_table
from tdm_runtime.backends.machine import installed

PACKAGES = ("torch", "diffusers", "openvino")
PAUSES_S = (0.0, 0.005, 0.02, 0.05, 0.1, 0.3, 1.0)
"""Pauses before memory is read."""
READS = 9
"""Reads after each pause."""
READ_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Environment:
    """Machine and versions that a measurement depends on."""

    cpu: str
    cores: int
    python: str
    versions: dict[str, str]
    commit: str

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return f"{self.cpu}, {self.cores} cores, Python {self.python}, {versions}, commit {self.commit}"


def environment() -> Environment:
    """Return the environment of this process and the commit of its repository."""
    cpu = platform.processor() or platform.machine()
    if (cpuinfo := Path("/proc/cpuinfo")).is_file():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        cpu = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), cpu)
    folder = Path(__file__).resolve().parent
    asked = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    except OSError:  # git is not installed
        commit = ""
    return Environment(cpu, os.cpu_count() or 1, platform.python_version(), installed(PACKAGES), commit or "unknown")


def machine() -> str:
    """Return CPU, cores, versions and commit in one line."""
    return f"{environment()}\n"


def environment_json() -> dict[str, object]:
    """Return `environment` as a dict for JSON."""
    return asdict(environment())


def read_ms(pause_s: float) -> float:
    """Return the median milliseconds of reading `READ_BYTES` of memory that was read before a pause."""
    memory, times_ms = np.ones(READ_BYTES // 8), []
    for _ in range(READS + 1):
        time.sleep(pause_s)
        began_s = time.perf_counter()
        memory.sum()
        times_ms.append(1e3 * (time.perf_counter() - began_s))
    return statistics.median(times_ms[1:])  # the first read came after the memory was written


if __name__ == "__main__":
    print(machine())
    rows = [[f"{1e3 * pause_s:g}", f"{read_ms(pause_s):.2f}"] for pause_s in PAUSES_S]
    print(markdown_table(["pause, ms", f"reading {READ_BYTES >> 20} MB, ms"], rows))
