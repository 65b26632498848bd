"""Compare Triton with the engine in this process: pictures a second with 16 in flight, and the time of a lone request.

    build/triton/bin/python -m benchmarks.triton --address 127.0.0.1:8001

`make triton` starts the server. Both make the same pictures of the embedded checkpoint on the same backend, in turns.
The server stays up while this process measures its own engine, but it is idle then.
"""

from __future__ import annotations

import argparse
import itertools
import queue
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.machine import machine
from tdm_runtime import BackendConfig, DiffusionEngine, SamplingParams, load_model
from tdm_runtime.engine.warm_up import warm_up

IN_FLIGHT = 16
STEPS = 4
Answer = Callable[[], None]
Submit = Callable[[str, int, Answer], None]
"""Submits (prompt, seed) and calls the function when the picture is there."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="benchmarks.triton", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--address", default="127.0.0.1:8001", help="gRPC address of tritonserver (%(default)s)")
    parser.add_argument("--pictures", type=int, default=400, help="pictures a round and contender (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds over both (%(default)s)")
    parser.add_argument("--backend", default="auto", help="of the engine in this process; give the server the same")
    given = parser.parse_args(arguments)
    model = load_model(config=BackendConfig(given.backend, threads=0))
    rates: dict[str, list[float]] = {"engine in process": [], "Triton": []}
    lone_ms: dict[str, list[float]] = {name: [] for name in rates}
    with DiffusionEngine(model) as engine, TritonModel(given.address) as triton:
        warm_up(engine)
        width, height = model.recipe.native_sizes[0]

        def submit(prompt: str, seed: int, done: Answer) -> None:
            params = SamplingParams(prompt, seed, STEPS, width, height)
            engine.submit(params).add_done_callback(lambda future: done())

        contenders: dict[str, Submit] = {"engine in process": submit, "Triton": triton.submit}
        prompts = (f"a red heart {number}" for number in itertools.count())
        for _ in range(given.rounds):
            for name, contender in contenders.items():
                rates[name].append(pictures_per_second(contender, prompts, given.pictures))
                lone_ms[name] += [lone_seconds(contender, prompts) * 1e3 for _ in range(20)]
    print(f"{machine()}, {model.choice or model.backend}")
    print(f"| K = {STEPS} | pictures/s, {IN_FLIGHT} in flight | lone request, ms, p50 |\n|---|---|---|")
    for name in rates:
        print(f"| {name} | {statistics.median(rates[name]):.1f} | {statistics.median(lone_ms[name]):.1f} |")
    ratios = [there / here for here, there in zip(rates["engine in process"], rates["Triton"], strict=True)]
    print(f"Triton / engine, median of rounds: {statistics.median(ratios):.2f}")
    return 0


def pictures_per_second(submit: Submit, prompts: Any, pictures: int) -> float:
    """Make pictures with `IN_FLIGHT` of them under way at any time."""
    done: queue.Queue[None] = queue.Queue()
    started_s = time.perf_counter()
    for seed in range(pictures):
        if seed >= IN_FLIGHT:
            done.get()
        submit(next(prompts), seed, lambda: done.put(None))
    for _ in range(min(IN_FLIGHT, pictures)):
        done.get()
    return pictures / (time.perf_counter() - started_s)


def lone_seconds(submit: Submit, prompts: Any) -> float:
    """Return the seconds of one request on an idle engine."""
    done: queue.Queue[None] = queue.Queue()
    started_s = time.perf_counter()
    submit(next(prompts), 0, lambda: done.put(None))
    done.get()
    return time.perf_counter() - started_s


class TritonModel:
    """A stream to the Triton model `tdm`."""

    def __init__(self, address: str) -> None:
        import tritonclient.grpc  # in the environment of tritonserver only

        self._grpc = tritonclient.grpc
        self._client = tritonclient.grpc.InferenceServerClient(address)
        self._waiting: dict[str, Answer] = {}
        self._ids = itertools.count()

    def __enter__(self) -> TritonModel:
        self._client.start_stream(self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        self._client.stop_stream()

    def submit(self, prompt: str, seed: int, done: Answer) -> None:
        """See `Submit`."""
        request_id = str(next(self._ids))
        self._waiting[request_id] = done
        values = (("prompt", "BYTES", np.object_, prompt), ("seed", "UINT64", np.uint64, seed))
        inputs = []
        for name, datatype, dtype, value in (*values, ("num_inference_steps", "INT32", np.int32, STEPS)):
            inputs.append(self._grpc.InferInput(name, [1], datatype))
            inputs[-1].set_data_from_numpy(np.array([value], dtype=dtype))
        self._client.async_stream_infer("tdm", inputs, request_id=request_id)

    def _receive(self, result: Any, error: Any) -> None:
        if error is not None:
            raise error
        result.as_numpy("generated_image")
        self._waiting.pop(result.get_response().id)()


if __name__ == "__main__":
    sys.exit(main())
