"""A run on Ray Data: one task reads and plans, a pool of actors with an engine each makes the chunks.

Chunks, pictures and entries are those of a run in one process. If an actor is lost, Ray gives its chunks to another
one; where files can grow, that one keeps what the lost one finished. The output must be a place that all machines
reach: a shared folder, or a URL.
"""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import threading
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import pyarrow
import ray
from ray.data import ActorPoolStrategy, DataContext, Datasource, ReadTask, read_datasource
from ray.data.block import BlockMetadata

from serving.config import ServerConfig
from serving.offline.chunk import ChunkRenderer, ChunkResult
from serving.offline.plan import Model, Planner
from serving.offline.progress import Progress
from serving.offline.records import Known
from serving.offline.run import LOCAL, OPEN_CHUNKS, RayOptions, RunOptions, open_output
from serving.telemetry.logs import set_up_logging


class ChunkSource(Datasource):  # type: ignore[misc]  # Ray is not typed
    """Chunks, one in each block. They are read as the workers ask for them."""

    def __init__(self, options: RunOptions, models: Mapping[str, Model]) -> None:
        super().__init__()
        self._options = options
        self._models = models

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        options, models = self._options, self._models

        def read() -> Iterable[pyarrow.Table]:
            storage, _ = open_output(options)
            for chunk in Planner(options.plan, models, Known(storage)).chunks():
                yield pyarrow.table({"chunk": [pickle.dumps(chunk)]})

        return [ReadTask(read, BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None))]


class Worker:
    """Actor with an engine. Its chunks share the engine's calls."""

    def __init__(self, config: ServerConfig, options: RunOptions, num_in_flight: int) -> None:
        from serving.images.local import ImageService
        from serving.telemetry.metrics import ServerMetrics

        set_up_logging(config)
        images = ImageService(config, ServerMetrics())
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="chunks", daemon=True).start()
        self._renderer = ChunkRenderer(images, *open_output(options), num_in_flight)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[bytes]]:
        """Make the chunks of a batch."""
        chunks = [pickle.loads(chunk) for chunk in batch["chunk"]]
        making = [asyncio.run_coroutine_threadsafe(self._renderer.render(chunk), self._loop) for chunk in chunks]
        return {"result": [pickle.dumps(each.result()) for each in making]}


def render_on_ray(
    config: ServerConfig,
    models: Mapping[str, Model],
    options: RunOptions,
    cluster: RayOptions,
    num_in_flight: int,
    progress: Progress,
) -> None:
    """Make all chunks on a cluster.

    Raises:
        RuntimeError: the input cannot be read, the output not be written, or the cluster not be used.
    """
    is_local = cluster.address == LOCAL
    if is_local:
        # A worker more than the engines: the reader has a processor of its own to Ray.
        where: dict[str, Any] = {"num_cpus": cluster.workers + 1, "include_dashboard": False}
        if not config.backend.threads:
            threads = max(1, (os.cpu_count() or 1) // cluster.workers)
            config = replace(config, backend=replace(config.backend, threads=threads))
    else:
        where = {"address": cluster.address}
    try:
        ray.init(logging_level=logging.WARNING, log_to_driver=True, **where)
        context = DataContext.get_current()
        context.enable_progress_bars = False
        context.target_max_block_size = 1  # a block for each chunk, so that chunks spread over the workers
        results = read_datasource(ChunkSource(options, models), override_num_blocks=1).map_batches(
            Worker,
            fn_constructor_args=(config, options, num_in_flight),
            batch_size=None,
            compute=ActorPoolStrategy(
                size=cluster.workers,
                max_tasks_in_flight_per_actor=OPEN_CHUNKS,
                enable_true_multi_threading=True,  # otherwise a chunk begins when the one before has ended
            ),
            num_cpus=1,
            num_gpus=cluster.gpus_per_worker or None,
            ray_remote_args_fn=lambda: {"max_concurrency": OPEN_CHUNKS},
        )
        num_units = 0
        progress.start()
        for row in results.iter_rows():
            result: ChunkResult = pickle.loads(row["result"])
            num_units += sum(result.counts.values())
            progress.expect(num_units, result.share)
            for outcome, number in result.counts.items():
                progress.add(outcome, number)
            progress.fail(result.failures)
    except (ray.exceptions.RayError, ConnectionError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise RuntimeError(f"the run on Ray ended: {reason[:400]}; start it again, it continues") from error
    finally:
        ray.shutdown()
