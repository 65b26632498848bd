"""CUDA graphs of the checkpoint's own modules: one recording for each shape, replayed without Python.

Not run yet on a GPU.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tdm_runtime.backends.buckets import in_buckets
from tdm_runtime.backends.interface import Interface
from tdm_runtime.backends.pytorch import TorchBackend
from tdm_runtime.errors import BackendError

MAX_GRAPHS = 32
"""Number of recordings kept; the least recently used is dropped first."""
MAX_PADDING = 0.5
"""Share of a batch that may be padding. A GPU's time hardly grows with the batch, so every batch is one replay."""
WARM_UP_CALLS = 3
"""Calls before a recording, in which libraries choose kernels and allocate workspaces."""

_RECORDING = threading.Lock()
"""torch records one graph at a time in a process; it synchronises the device before a recording, not during it."""


@dataclass(frozen=True)
class _Graph:
    """A recording and the memory it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    output: Tensor


class CudaGraphBackend(TorchBackend):
    """Records the kernels of a module once for each shape and replays them.

    All recordings share one pool of memory: they never run at once, and a result is copied out before the next.
    """

    def __init__(
        self,
        module: nn.Module,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        interface: Interface | None = None,
        max_graphs: int = MAX_GRAPHS,
    ) -> None:
        """
        Args:
            dtype, interface: as of `TorchBackend`.
            max_graphs: Number of shapes kept recorded.

        Raises:
            BackendError: the device is not a CUDA device, or torch finds none.
        """
        if device.type != "cuda" or not torch.cuda.is_available():
            raise BackendError(
                f"cuda-graphs was asked for {device} and "
                f"{'torch finds no CUDA device' if device.type == 'cuda' else 'needs a CUDA device'}; "
                "choose torch or torch-compiled"
            )
        if max_graphs < 1:
            raise ValueError(f"max_graphs is {max_graphs}; keep at least 1")
        super().__init__(module, device, dtype, interface=interface)
        self._graphs: OrderedDict[tuple[torch.Size, ...], _Graph] = OrderedDict()
        self._max_graphs = max_graphs
        with torch.cuda.device(device):
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = cuda_stream(device)

    def _run(self, inputs: Sequence[Tensor]) -> Tensor:
        with torch.cuda.device(self.device):
            return in_buckets(self._replayed, inputs, MAX_PADDING)

    def _replayed(self, inputs: Sequence[Tensor]) -> Tensor:
        shapes = tuple(tensor.shape for tensor in inputs)
        if shapes not in self._graphs:
            with _RECORDING:
                self._make_room()
                self._graphs[shapes] = self._recorded(inputs)
        self._graphs.move_to_end(shapes)
        recorded = self._graphs[shapes]
        for static, tensor in zip(recorded.inputs, inputs, strict=True):
            static.copy_(tensor)
        recorded.graph.replay()
        return recorded.output.clone()

    def _recorded(self, inputs: Sequence[Tensor]) -> _Graph:
        static = [tensor.clone(memory_format=torch.contiguous_format) for tensor in inputs]
        graph = torch.cuda.CUDAGraph()
        try:
            with side_stream(self._stream):
                for _ in range(WARM_UP_CALLS):
                    super()._run(static)
            # The decoder's thread may allocate meanwhile: only this thread is held to what can be recorded.
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                output = super()._run(static)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in inputs)
            raise BackendError(
                f"a CUDA graph of {type(self._module).__name__} for {shapes} cannot be recorded "
                f"({str(error).splitlines()[0]}); choose torch or torch-compiled"
            ) from error
        return _Graph(graph, static, output)

    def _make_room(self) -> None:
        while len(self._graphs) >= self._max_graphs:
            torch.cuda.synchronize()  # it may still be running
            self._graphs.popitem(last=False)


def cuda_stream(device: torch.device) -> torch.cuda.Stream:
    """Make a stream that is not the default one."""
    make: Callable[..., torch.cuda.Stream] = torch.cuda.Stream  # torch leaves it untyped
    return make(device)


@contextmanager
def side_stream(stream: torch.cuda.Stream) -> Iterator[None]:
    """Run the block on `stream`, after the work already on the caller's stream and before its later work."""
    caller = torch.cuda.current_stream(stream.device)
    stream.wait_stream(caller)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        caller.wait_stream(stream)
