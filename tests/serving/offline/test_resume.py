"""A run that was killed continues, and its output is that of a run that was not."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from benchmarks.render import finished_keys
from serving.config import ModelSource, ServerConfig
from serving.images.local import ImageService
from serving.offline.chunk import ChunkRenderer
from serving.offline.lines import find_sources
from serving.offline.outputs import Files
from serving.offline.plan import Planner, PlanOptions, find_models
from serving.offline.records import Known
from serving.offline.storage import Storage
from serving.telemetry.metrics import ServerMetrics
from tdm_runtime.model.artifacts import BackendConfig
from tests.serving.offline.conftest import Render, hashes, manifest, mixed_lines, start, write_lines

NUMBER = 120
SHARD = 24


def kill_after(folder: Path, checkpoint: Path, number: int, *arguments: object) -> None:
    """Start a run, and kill it when it has finished a number of pictures more."""
    running = start(checkpoint, *arguments)
    before, deadline_s = len(finished_keys(folder)), time.monotonic() + 240
    while running.poll() is None and time.monotonic() < deadline_s and len(finished_keys(folder)) < before + number:
        time.sleep(0.002)
    os.kill(running.pid, signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL, "the run ended before it was killed"


@pytest.mark.parametrize("kind", ["files", pytest.param("webdataset", marks=pytest.mark.slow)])
def test_killed_runs_continue_to_the_same_bytes(
    render: Render, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    source = write_lines(tmp_path / "in.jsonl", [*mixed_lines(NUMBER), {"prompt": ""}])
    options = ["--format", kind, "--shard-size", SHARD, "--grid"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert render(source, "-o", whole, *options) == 1
    for _ in range(2 if kind == "files" else 1):
        kill_after(out, tiny_checkpoint, random.Random(kind).randrange(5, 30), source, "-o", out, *options)
        assert not (out / "manifest.jsonl").exists()
        for file in out.glob("*.png"):
            assert file.read_bytes().endswith(b"IEND\xaeB\x60\x82"), "a torn picture"
    recorded, written = len(finished_keys(out)), len(list(out.rglob("*.png")))
    assert recorded >= max(10, written - 1), "pictures on the disk would be made again"
    capsys.readouterr()
    assert render(source, "-o", out, *options) == 1
    assert f"{recorded} kept" in capsys.readouterr().out
    assert hashes(out) == hashes(whole)
    counts = Counter(record["id"] for record in manifest(out))
    assert len(counts) == NUMBER + 1 and set(counts.values()) == {1}


def test_nothing_is_made_twice_but_what_is_missing(
    render: Render, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_lines(tmp_path / "in.jsonl", mixed_lines(10))
    out = tmp_path / "out"
    assert render(source, "-o", out, "--name", "{id}") == 0
    first = hashes(out)
    seen = {file.name: file.stat().st_mtime_ns for file in out.glob("*.png")}
    capsys.readouterr()
    (out / "p3.png").unlink()
    (out / "p4.png").write_bytes((out / "p4.png").read_bytes()[:-9])
    assert render(source, "-o", out, "--name", "{id}") == 0
    assert "2 pictures made, 8 kept, 0 failed" in capsys.readouterr().out
    assert hashes(out) == first
    changed = {file.name for file in out.glob("*.png") if file.stat().st_mtime_ns != seen[file.name]}
    assert changed == {"p3.png", "p4.png"}
    with (out / "manifest.jsonl").open("ab") as stream:
        stream.write(b'[]\n{"id": 7}\n{"id": "p1", "status": "completed", "key": "x", "receipt": 3}\n\xff\n')
    lines = mixed_lines(12)
    lines[5]["num_inference_steps"] = 1
    write_lines(source, lines[::-1])
    assert render(source, "-o", out, "--name", "{id}") == 0
    assert "3 pictures made, 9 kept, 0 failed" in capsys.readouterr().out, "two lines more, one changed, all moved"
    assert [record["line"] for record in manifest(out)] == list(range(1, 13))


def test_sealed_shards_are_kept_and_damaged_ones_made_again(
    render: Render, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = write_lines(tmp_path / "in.jsonl", mixed_lines(9)), tmp_path / "out"
    options = ["-o", out, "--format", "webdataset", "--shard-size", 3]
    assert render(source, *options) == 0
    first = hashes(out)
    assert render(source, *options) == 0
    assert "0 pictures made, 9 kept" in capsys.readouterr().out and hashes(out) == first
    (out / "000001.tar").write_bytes(b"torn")
    (out / "times.jsonl").unlink()
    assert render(source, *options) == 0
    assert "3 pictures made, 6 kept" in capsys.readouterr().out and hashes(out) == first


def test_two_runs_do_not_share_a_folder(
    render: Render, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_lines(tmp_path / "in.jsonl", mixed_lines(1))
    with Storage(str(tmp_path / "out")).locked():
        assert render(source, "-o", tmp_path / "out") == 2
    assert "another run" in capsys.readouterr().err


def test_a_chunk_of_a_lost_worker_keeps_what_was_finished(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The second worker knows only the plan and the journal, which ends in a torn line."""
    source = write_lines(tmp_path / "in.jsonl", mixed_lines(4))
    config = ServerConfig(models=(ModelSource(tiny_checkpoint),), backend=BackendConfig("torch", threads=1))
    storage = Storage(str(tmp_path / "out"))
    planner = Planner(PlanOptions(tuple(find_sources(str(source)))), find_models(config), Known(storage))
    (chunk,) = planner.chunks()
    images = ImageService(config, ServerMetrics())
    try:
        results = []
        for _ in range(3):
            results.append(asyncio.run(ChunkRenderer(images, storage, Files(storage), 8).render(chunk)).counts)
            (journal,) = (tmp_path / "out").glob(".tdm-render/journals/*")
            journal.write_bytes(journal.read_bytes()[:-5])
    finally:
        images.close()
    elsewhere = Storage(str(tmp_path / "elsewhere"))
    with pytest.raises(RuntimeError, match="the engine has stopped"):
        asyncio.run(ChunkRenderer(images, elsewhere, Files(elsewhere), 8).render(chunk))
    assert results[0] == {"made": 4, "kept": 0, "failed": 0}
    assert results[1:] == [{"made": 1, "kept": 3, "failed": 0}] * 2


@pytest.mark.slow
def test_ray_gives_the_same_output_and_survives_a_lost_actor(
    render: Render, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Two actors; one is killed while it works. The tree is that of a run in one process."""
    source = write_lines(tmp_path / "in.jsonl", mixed_lines(400))
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert render(source, "-o", whole, "--shard-size", 20) == 0
    running = start(tiny_checkpoint, source, "-o", out, "--shard-size", 20, "--ray", "local", "--workers", 2)
    victim, deadline_s = None, time.monotonic() + 240
    while victim is None and running.poll() is None and time.monotonic() < deadline_s:
        time.sleep(0.05)
        if len(finished_keys(out)) > 30:
            workers = [p for p in psutil.Process(running.pid).children(recursive=True) if "Worker" in p.name()]
            victim = next((p for p in workers if "MapWorker" in " ".join(p.cmdline())), None)
    assert victim is not None, running.communicate()[1][-3000:]
    victim.kill()
    output, errors = running.communicate(timeout=240)
    assert running.returncode == 0, errors[-3000:]
    assert sum(map(int, re.findall(rb"(\d+) (?:pictures made|kept)", output))) == 400
    assert hashes(out) == hashes(whole)
    assert json.loads((out / "manifest.jsonl").read_bytes().splitlines()[0])["id"] == "p0"
