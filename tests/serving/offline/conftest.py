"""`tdm-render` on the tiny checkpoint, in this process or in one of its own."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from serving.offline.cli import main
from serving.offline.records import TIMES

Render = Callable[..., int]
ALONE = ("--backend", "torch", "--threads", "1", "--max-batch-size", "1")


def command(checkpoint: Path, *arguments: object) -> list[str]:
    """Return the arguments of a run, on the tiny checkpoint unless they name models.

    Torch needs no artifacts and is quick at this size. Strict pictures on torch are made alone, so larger batches would
    only lengthen the warm-up.
    """
    tiny = [] if "--model" in arguments else ["--checkpoint", str(checkpoint)]
    return [*map(str, arguments), *tiny, *ALONE]


@pytest.fixture
def render(tiny_checkpoint: Path) -> Render:
    """The command, in this process. Returns its exit status."""
    return lambda *arguments: main(command(tiny_checkpoint, *arguments))


def start(checkpoint: Path, *arguments: object) -> subprocess.Popen[bytes]:
    """Start the command in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3]), "RAY_USAGE_STATS_ENABLED": "0"}
    line = [sys.executable, "-m", "serving.offline.cli", *command(checkpoint, *arguments)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)


def hashes(folder: Path) -> dict[str, str]:
    """Return the hash of every file of a run by its path, without the log of times."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
        if file != folder / TIMES
    }


def manifest(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_bytes().splitlines()]


def write_lines(file: Path, lines: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file


def mixed_lines(number: int) -> list[dict[str, Any]]:
    """Return requests of mixed step counts and sizes."""
    return [
        {
            "id": f"p{n}",
            "prompt": f"a red heart {n}",
            "num_inference_steps": 1 + n % 4,
            "size": ("16x16", "24x16")[n % 2],
        }
        for n in range(number)
    ]
