"""Runs a Ray cluster on this machine: offers upgrades to its proxy, then kills one node under load.

It needs its own process, because Ray keeps global state.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import psutil

from serving.command.cli import prepare_environment
from tests.serving.fronts.raw_http import conversations

NUM_CLIENTS = 6
ANSWERS_BEFORE = 2
"""Answers that each client gets before a node is killed."""
ANSWERS_AFTER = 5
"""Answers that each client gets after it."""
EXPORT_S = 20.0
"""Longest time until the spans of answered requests are in the trace file; the SDK writes them every five seconds."""


def main(checkpoint: Path, port: int, trace_file: Path) -> None:
    """Print the results of the clients as JSON."""
    prepare_environment()
    import ray
    from ray import serve
    from ray.cluster_utils import Cluster

    from serving.config import ModelSource, ServerConfig
    from serving.deployment import build_application, ray_logging
    from tdm_runtime.engine.engine import EngineConfig
    from tdm_runtime.model.artifacts import BackendConfig

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    workers = [cluster.add_node(num_cpus=2) for _ in range(2)]
    ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=bool(os.environ.get("SHOW_LOGS")))
    config = ServerConfig(
        models=(ModelSource(checkpoint),),
        front="ray",
        min_replicas=2,
        max_replicas=2,
        engine=EngineConfig(max_batch_size=4),  # a short warm-up
        backend=BackendConfig("torch", threads=1),
        trace_file=trace_file,
    )
    serve.start(
        http_options={"host": "127.0.0.1", "port": port, "location": "HeadOnly"}, logging_config=ray_logging("text")
    )
    serve.run(build_application(config), name="images", route_prefix="/")
    wrong = wrong_answers(port)
    loaded = under_load(cluster, workers, f"http://127.0.0.1:{port}")
    print(json.dumps({"wrong": wrong, "spans": spans(trace_file)} | loaded), flush=True)
    ray.shutdown()
    cluster.shutdown()


def wrong_answers(port: int) -> dict[str, object]:
    """Offer upgrades. Returns the first conversation with answers that were not expected, if there is one."""
    for conversation in conversations():
        answers = conversation.hold(port)
        if answers != conversation.expected:
            return {conversation.name: answers}
    return {}


def under_load(cluster: object, workers: list[object], url: str) -> dict[str, object]:
    """Request pictures from several clients and kill a node meanwhile."""
    seen: Counter[str] = Counter()
    pictures: dict[int, set[str]] = {}
    is_warm, is_killed = threading.Barrier(NUM_CLIENTS + 1, timeout=60), threading.Event()

    def ask(client_number: int) -> None:
        seed, left = client_number, ANSWERS_AFTER
        with httpx.Client(base_url=url, timeout=60) as client:
            for number in itertools.count():
                if number == ANSWERS_BEFORE:
                    is_warm.wait()
                if is_killed.is_set():
                    left -= 1
                if left < 0:
                    return
                seed = (seed + NUM_CLIENTS) % 30
                body = {"prompt": "a cat", "seed": seed, "n": 2, "num_inference_steps": 4, "latency_budget_ms": 6e4}
                answer = client.post("/v1/images/generations", json=body)
                seen[str(answer.status_code)] += 1
                if answer.status_code == 200:
                    pictures.setdefault(seed, set()).add(answer.json()["data"][0]["receipt"]["digest"])
                else:
                    print(answer.text[:300], file=sys.stderr)

    clients = [threading.Thread(target=ask, args=(number,)) for number in range(NUM_CLIENTS)]
    for client in clients:
        client.start()
    is_warm.wait()
    time.sleep(0.5)  # all clients wait for answers of both replicas by now
    lost, processes = next((node, running) for node in workers if is_replica_in(running := processes_of(node)))
    for process in processes:  # at once, as when its machine stops; Ray alone lets them end a while later
        process.kill()
    is_killed.set()
    cluster.remove_node(lost, allow_graceful=False)  # type: ignore[attr-defined]
    for client in clients:
        client.join()
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    values = {name: float(value) for name, _, value in (line.partition(" ") for line in lines if line[0] != "#")}
    counted = {name: values[f"tdm_{name}_total"] for name in ("retried", "budgets_promised", "budgets_kept")}
    return {"statuses": seen, "num_seeds": len(pictures)} | counted


def spans(trace_file: Path) -> list[str]:
    """Return the names of all kinds of spans, once some have been written."""
    ends_s = time.monotonic() + EXPORT_S
    while not (written := trace_file.read_text().splitlines()) and time.monotonic() < ends_s:
        time.sleep(0.1)
    return sorted({json.loads(line)["name"] for line in written})


def processes_of(node: object) -> list[psutil.Process]:
    """Return the processes of a node's workers."""
    raylet = node.all_processes["raylet"][0].process.pid  # type: ignore[attr-defined]
    return psutil.Process(raylet).children(recursive=True)


def is_replica_in(processes: list[psutil.Process]) -> bool:
    """Whether a replica runs on the node of these processes."""
    return any("ray::ServeReplica" in " ".join(process.cmdline()) for process in processes)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
