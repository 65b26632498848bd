"""A real tritonserver on a copy of the model repository."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path

import psutil

from tests.ports import free_port

ROOT = Path(__file__).parents[2]
START_TIMEOUT_S = 300.0


def copy_repository(folder: Path, parameters: Mapping[str, str], model: str = "tdm") -> Path:
    """Copy the model repository and set parameters of one of its models. Returns the copy's folder."""
    shutil.copytree(ROOT / "model_repository", folder, ignore=shutil.ignore_patterns("__pycache__"))
    set_parameters(folder / model, parameters)
    return folder


def set_parameters(model: Path, parameters: Mapping[str, str]) -> None:
    """Set parameters of a model."""
    config = model / "config.pbtxt"
    text = config.read_text()
    for name, value in parameters.items():
        line = rf'(key: "{name}", value: {{ string_value: ")[^"]*'
        text, found = re.subn(line, lambda match, value=value: match[1] + value, text)
        assert found == 1, name
    config.write_text(text)


class TritonServer:
    """A running tritonserver and its three ports."""

    def __init__(self, repository: Path, log: Path) -> None:
        self.log = log
        self.http, self.grpc, self.metrics = (f"127.0.0.1:{free_port()}" for _ in range(3))
        ports = {"http": self.http, "grpc": self.grpc, "metrics": self.metrics}
        command = [sys.executable, str(ROOT / "deploy" / "triton" / "start.py"), f"--model-repository={repository}"]
        command += [f"--{name}-port={address.rpartition(':')[2]}" for name, address in ports.items()]
        with log.open("wb") as stream:
            self.process = subprocess.Popen(command, stdout=stream, stderr=stream, start_new_session=True)

    def wait_until_ready(self) -> None:
        """Wait until all models are loaded.

        Raises:
            RuntimeError: the server ended, or was not ready in time; the message holds the end of its log.
        """
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline_s and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"http://{self.http}/v2/health/ready", timeout=5):
                    return
            except OSError:
                time.sleep(0.2)
        raise RuntimeError(f"not ready: {self.log.read_text(errors='replace')[-3000:]}")

    def stop(self) -> int:
        """Stop the server as its operators do. Returns its exit status."""
        self.process.terminate()
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise

    def read_usage(self) -> dict[str, float]:
        """Return threads and resident MiB of the server and its models' processes, and MiB of shared memory files."""
        server = psutil.Process(self.process.pid)
        family = [server, *server.children(recursive=True)]
        return {
            "threads": sum(process.num_threads() for process in family),
            "resident_mib": sum(process.memory_info().rss for process in family) / 2**20,
            "shared_mib": sum(file.stat().st_size for file in Path("/dev/shm").glob("triton_python*")) / 2**20,
        }

    def read_metrics(self) -> dict[str, float]:
        """Return the values of the engine's metrics of the model `tdm`, by name."""
        with urllib.request.urlopen(f"http://{self.metrics}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        return {line.partition("{")[0]: float(line.rpartition(" ")[2]) for line in lines if 'model="tdm"' in line}
