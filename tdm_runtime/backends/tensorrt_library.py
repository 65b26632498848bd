"""NVIDIA's two TensorRT libraries behind one interface: `tensorrt` (data centres) and `tensorrt-rtx` (RTX GPUs).

Both read ONNX and have nearly one API. Here is what differs:

| | tensorrt | tensorrt-rtx |
|---|---|---|
| a plan is built | on the GPU that runs it, which tries kernels | anywhere, ahead of time, for named capabilities |
| kernels | chosen by a build; times are kept in a timing cache | compiled by first calls, kept in a runtime cache |

tensorrt-rtx can capture CUDA graphs itself. That is left off: whether it pays with new addresses at each call was not
measured.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tdm_runtime.backends.machine import gpu_architecture
from tdm_runtime.errors import ArtifactError, BackendError
from tdm_runtime.whole_file import write_whole

logger = logging.getLogger(__name__)

Package = Literal["tensorrt", "tensorrt-rtx"]
PACKAGES: tuple[Package, ...] = ("tensorrt", "tensorrt-rtx")
"""Packages on the index; the first that is installed is used."""


@dataclass(frozen=True)
class TensorRT:
    """An installed TensorRT library."""

    package: Package
    module: Any
    """The module `tensorrt` or `tensorrt_rtx`."""

    @property
    def version(self) -> str:
        return str(self.module.__version__)

    @property
    def builds_ahead(self) -> bool:
        """Whether plans are built for named GPUs, on a machine that need not have one."""
        return self.package == "tensorrt-rtx"

    @property
    def can_refit(self) -> bool:
        """Whether plans built here may have their weights replaced later.

        tensorrt-rtx 1.7.1 compiles kernels for that while it builds, which needs a driver: without one, the build of a
        text encoder fails.
        """
        return not self.builds_ahead or gpu_architecture() is not None

    def capabilities(self) -> tuple[str, ...]:
        """Return the compute capabilities that can be named, such as "sm_86"; empty if none can."""
        if not self.builds_ahead:
            return ()
        return tuple(f"sm_{name[2:]}" for name in self.module.ComputeCapability.__members__ if name.startswith("SM"))

    def gpus(self, named: Sequence[str]) -> tuple[str, ...]:
        """Return the GPUs to build for: those named, or this machine's.

        Raises:
            BackendError: the library cannot build for them; the message says what it builds for.
        """
        here, known = gpu_architecture(), self.capabilities()
        if named and not self.builds_ahead and tuple(named) != (here,):
            raise BackendError(
                f"--gpu names {', '.join(named)}; {self.package} builds a plan only on the GPU that runs it, and this "
                f"machine has {here or 'no CUDA device'}: build there, or install tensorrt-rtx, which builds ahead"
            )
        if unknown := [gpu for gpu in named if self.builds_ahead and gpu not in known]:
            raise BackendError(
                f"--gpu names {', '.join(unknown)}; {self.package} {self.version} builds for {', '.join(known)}"
            )
        if not named and here is None:
            remedy = f"name GPUs with --gpu, of {', '.join(known)}" if known else "build there"
            raise BackendError(
                f"a {self.package} plan is built for one GPU, and torch finds no CUDA device here: {remedy}"
            )
        return tuple(named) or ((here,) if here else ())

    def set_target(self, config: Any, gpu: str, timing_cache: Path | None) -> None:
        """Set what a build is for: the GPU by name, or this one with the kernel times of earlier builds.

        Args:
            config: `IBuilderConfig`.
        """
        if not self.builds_ahead:
            _read_timing_cache(config, timing_cache)
            return
        kinds = self.module.ComputeCapability
        config.num_compute_capabilities = 1
        target = kinds.__members__.get(f"SM{gpu.removeprefix('sm_')}", kinds.CURRENT)  # CURRENT: here, but not named
        if not config.set_compute_capability(target, 0):
            raise BackendError(f"{self.package} {self.version} does not build for {gpu}")

    def keep_timing(self, config: Any, timing_cache: Path | None) -> None:
        """Keep the kernel times of a build for the next one; tensorrt-rtx has none."""
        if timing_cache is not None and not self.builds_ahead:
            write_whole(timing_cache, config.get_timing_cache().serialize())

    def log(self) -> Any:
        """Return an `ILogger` that passes warnings to our log and keeps the last error as `last`.

        Its base class exists only where the package is installed. It must outlive what was made with it.
        """
        return _log(self.module)

    def context(self, plan: Any, file: Path, log: Any) -> tuple[Any, KernelCache | None]:
        """Return an execution context of a loaded plan, and where the kernels that it compiles are kept.

        Raises:
            BackendError: there is no context, most often for lack of memory.
        """
        kept = None
        if self.builds_ahead:
            config = plan.create_runtime_config()
            # Kernels for a shape are compiled at its first call, which warm-up makes, and not during later calls.
            config.dynamic_shapes_kernel_specialization_strategy = (
                self.module.DynamicShapesKernelSpecializationStrategy.EAGER
            )
            kept = KernelCache(config, file.with_name(f"{file.name}.kernels"))
            context = plan.create_execution_context(config)
        else:
            context = plan.create_execution_context()
        if context is None:
            raise BackendError(
                f"TensorRT makes no context of {file} ({log.last}); it needs GPU memory for the largest call: free "
                "some, or export again with fewer or smaller sizes"
            )
        return context, kept


class KernelCache:
    """File of the kernels that tensorrt-rtx compiled at first calls, so that the next start compiles none."""

    def __init__(self, config: Any, file: Path) -> None:
        """
        Args:
            config: `IRuntimeConfig` of the context to come.
        """
        self._cache = config.create_runtime_cache()
        self._file = file
        if file.is_file() and not self._cache.deserialize(file.read_bytes()):
            logger.warning("%s is of another GPU or version; its kernels are compiled again", file)
        config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Write the file. Processes that share it replace it whole, so that none reads half of one."""
        try:
            write_whole(self._file, bytes(self._cache.serialize()))
        except OSError as error:
            logger.warning("%s cannot be written (%s); the next start compiles the kernels again", self._file, error)


def import_tensorrt(package: Package | None = None) -> TensorRT:
    """Return the installed TensorRT library.

    Args:
        package: the one to use, for a plan that it built. None: the first of `PACKAGES` that is installed.

    Raises:
        BackendError: none is installed, or its libraries cannot be loaded.
    """
    reasons = []
    for name in (package,) if package else PACKAGES:
        try:
            return TensorRT(name, importlib.import_module(name.replace("-", "_")))
        except (ImportError, OSError) as error:
            reasons.append(str(error))
    wanted = package or "tensorrt"
    raise BackendError(
        f"{wanted} cannot be imported ({'; '.join(reasons)}); `pip install 'tdm-serve[tensorrt]'` brings tensorrt-rtx, "
        "for RTX GPUs; `pip install tensorrt` brings the library for data centre GPUs"
    )


def loaded_plan(library: TensorRT, file: Path, log: Any) -> Any:
    """Load a plan. Returns the `ICudaEngine`.

    Raises:
        ArtifactError: the file is damaged or of another version, or there is no driver.
    """
    plan = library.module.Runtime(log).deserialize_cuda_engine(file.read_bytes())
    if plan is None:
        raise ArtifactError(
            f"{library.package} {library.version} cannot load {file} ({log.last}); check the NVIDIA driver with "
            "`nvidia-smi`, or run `tdm-export` again"
        )
    return plan


def parser_errors(parser: Any) -> str:
    """Return what an `OnnxParser` refused, each with the operator and the node."""
    errors = [parser.get_error(n) for n in range(parser.num_errors)]
    return "; ".join(f"{error.node_operator()} ({error.node_name()}): {error.desc()}" for error in errors)


def _log(trt: Any) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last = "no error was reported"

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.last = " ".join(message.split())
                logger.error("%s", message)
            elif severity == trt.ILogger.WARNING:
                logger.debug("%s", message)

    return Log()


def _read_timing_cache(config: Any, file: Path | None) -> None:
    if file is None:
        return
    known = file.read_bytes() if file.is_file() else b""
    if not config.set_timing_cache(config.create_timing_cache(known), ignore_mismatch=False):
        config.set_timing_cache(
            config.create_timing_cache(b""), ignore_mismatch=False
        )  # the cache is of another GPU or version
