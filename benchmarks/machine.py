"""Description of the machine, printed above every table."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

from tdm_runtime.backends.machine import installed

PACKAGES = ("torch", "diffusers", "openvino")


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
