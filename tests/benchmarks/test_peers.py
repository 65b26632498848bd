"""The peers: their pictures, their batching, and their start and stop."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.contenders import all_contenders
from benchmarks.peers.environment import interpreter_in
from benchmarks.peers.pipelines import (
    Job,
    OneThread,
    OurPipeline,
    StockPipeline,
    generate_batch,
    load_pipeline,
    make_grouped,
    our_backend,
)
from tdm_runtime.model.artifacts import BackendConfig
from tdm_runtime.model.choice import load_model
from tdm_runtime.params import SamplingParams
from tdm_runtime.pipeline import generate
from tests.ports import free_port

START_TIMEOUT_S = 120
ROUNDING = 1
"""Allowed difference in levels of 255: a larger batch may sum in another order."""


class Echo:
    """Pipeline whose pictures are their own request as text; it records every call."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[str], list[int], int]] = []

    def make(self, prompts: Sequence[str], seeds: Sequence[int], steps: int) -> list[bytes]:
        self.calls.append((list(prompts), list(seeds), steps))
        return [f"{prompt} {seed} {steps}".encode() for prompt, seed in zip(prompts, seeds, strict=True)]


def test_a_peer_with_our_backend_runs_what_our_server_runs(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default both choose alike; with arguments for our server, only a peer that reads them is comparable."""
    arguments = ["--checkpoint", str(tiny_checkpoint), "--backend", "torch", "--precision", "bf16", "--threads", "1"]
    peers = [one for one in all_contenders(arguments, ["--checkpoint", str(tiny_checkpoint)]) if one.is_peer]
    for name, value in peers[0].variables.items():
        monkeypatch.setenv(name, value)
    assert our_backend() == BackendConfig("torch", "bf16", threads=1)
    pipeline = load_pipeline("ours", tiny_checkpoint, 1)
    assert isinstance(pipeline, OurPipeline) and pipeline.backend == "torch bf16"


@pytest.mark.parametrize("steps", [1, 4])
def test_generate_batch_makes_the_pictures_of_generate(tiny_checkpoint: Path, steps: int) -> None:
    model = load_model(tiny_checkpoint)
    batch = [SamplingParams(f"a red cat {seed}", seed, steps, 24, 16) for seed in range(3)]
    for params, pixels in zip(batch, generate_batch(model, batch), strict=True):
        assert np.abs(pixels.astype(int) - generate(model, params)).max() <= ROUNDING


def test_the_stock_pipeline_makes_the_same_pictures_batched_and_alone(checkpoint_folder: Path) -> None:
    import torch

    stock = StockPipeline(checkpoint_folder, torch.float32)
    prompts, seeds = ["a red heart", "a blue cat"], [7, 8]
    for prompt, seed, png in zip(prompts, seeds, stock.make(prompts, seeds, 2), strict=True):
        (alone,) = stock.make([prompt], [seed], 2)
        assert np.abs(_pixels(png) - _pixels(alone)).max() <= ROUNDING


def test_make_grouped_calls_once_per_step_count_and_keeps_the_order() -> None:
    pipeline = Echo()
    jobs = [Job(f"prompt {n}", n, steps) for n, steps in enumerate((4, 1, 4, 2, 1))]
    assert make_grouped(pipeline, jobs) == [
        f"{job.prompt} {job.seed} {job.num_inference_steps}".encode() for job in jobs
    ]
    assert [(seeds, steps) for _, seeds, steps in pipeline.calls] == [([0, 2], 4), ([1, 4], 1), ([3], 2)]


def test_one_thread_loads_and_runs_in_the_same_thread() -> None:
    import threading

    threads: list[int] = []

    class Recorder(Echo):
        def __init__(self) -> None:
            super().__init__()
            threads.append(threading.get_ident())

        def make(self, prompts: Sequence[str], seeds: Sequence[int], steps: int) -> list[bytes]:
            threads.append(threading.get_ident())
            return super().make(prompts, seeds, steps)

    pipeline = OneThread(Recorder)
    assert pipeline.submit([Job("a cat", 0, 1)]).result() == [b"a cat 0 1"]
    pipeline.close()
    assert len(set(threads)) == 1
    assert threads[0] != threading.get_ident()


def test_an_environment_of_an_unknown_extra_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="the installed tdm-serve has no extra 'absent'; install it again"):
        interpreter_in(tmp_path / "absent", "absent")
    assert not (tmp_path / "absent").exists()


@pytest.fixture(scope="module")
def peers_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    return interpreter_in(tmp_path_factory.mktemp("peers"))


@pytest.mark.parametrize("peer", ["fastapi_lock", "litserve_batch", "bentoml_service"])
def test_a_peer_starts_answers_and_stops(peer: str, peers_python: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    port = free_port()
    command = [peers_python, "-m", f"benchmarks.peers.{peer}", "--port", str(port), "--backend", "stock-fp32"]
    log = tmp_path / "log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [*command, "--checkpoint", str(tiny_checkpoint)], stdout=stream, stderr=stream, start_new_session=True
        )
    try:
        _wait_until_ready(process, port, log)
        body = {"prompt": "a red cat", "seed": 7, "num_inference_steps": 2, "size": "16x16", "unheard_of": 1}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/images/generations",
            json.dumps(body).encode(),
            {"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            (picture,) = json.load(answer)["data"]
        assert (picture["seed"], picture["num_inference_steps"]) == (7, 2)
        assert _pixels(base64.b64decode(picture["b64_json"])).shape == (16, 16, 3)
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=10)
    finally:
        process.kill()
        process.wait()
    deadline = time.monotonic() + 5
    while _session_is_alive(process.pid):
        assert time.monotonic() < deadline, f"{peer} left a process behind"
        time.sleep(0.05)


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            pytest.fail(f"it ended with {process.returncode}:\n{log.read_text()[-2000:]}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:
            pass
        time.sleep(0.1)
    pytest.fail(f"it was not ready after {START_TIMEOUT_S} s:\n{log.read_text()[-2000:]}")


def _session_is_alive(leader: int) -> bool:
    try:
        os.killpg(leader, 0)
    except ProcessLookupError:
        return False
    return True


def _pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png))).astype(int)
