"""`BackendConfig`: the requested backend. `Artifacts`: the programs that `tdm-export` built from a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch

from tdm_runtime.backends import TORCH_BACKENDS, TORCH_DTYPES, BackendName, Precision, Provider
from tdm_runtime.backends.machine import gpu_architecture, installed
from tdm_runtime.backends.tensorrt_library import PACKAGES
from tdm_runtime.checkpoint.folder import Checkpoint
from tdm_runtime.checkpoint.manifest import (
    MANIFEST_FILE,
    Build,
    Manifest,
    default_artifacts,
    export_command,
    load_manifest,
)
from tdm_runtime.checkpoint.stock.text_precision import TextConfig
from tdm_runtime.errors import ArtifactError
from tdm_runtime.model.load import load_build, load_with_torch
from tdm_runtime.model.loaded_model import LoadedModel
from tdm_runtime.model.local_parity import LocalParity


@dataclass(frozen=True)
class BackendConfig:
    """Backend that runs a checkpoint."""

    backend: BackendName | Literal["auto"] = "torch"
    """Name of the backend. auto measures the available ones once and takes the fastest of at least `MIN_PSNR_DB`."""
    precision: Precision | None = None
    """Precision of the arithmetic. None: fp32 for torch, the first build for other backends."""
    threads: int | None = None
    """CPU threads of a call. 0: the fastest number for one picture, measured. None: the backend's own setting."""
    artifacts: Path | None = None
    """Folder that `tdm-export` wrote. None: its default folder."""
    allow_fallback: bool = False
    """Whether torch runs the checkpoint if the artifacts cannot be used. Otherwise loading fails."""
    device: str | None = None
    """torch device of the torch backends. None: CUDA if available, or else the CPU."""
    text: TextConfig = TextConfig()
    """Precision and device of the text encoders of stock pipelines."""
    provider: Provider | None = None
    """Execution provider of the backend onnxruntime. None: cuda if torch finds a GPU, or else cpu."""

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 0:
            raise ValueError(f"threads is {self.threads}; give a number of cores, or 0 to have it measured")
        if self.backend in TORCH_BACKENDS and self.precision not in (None, *TORCH_DTYPES):
            raise ValueError(f"{self.backend} does not run {self.precision}; choose {', '.join(TORCH_DTYPES)}")
        if self.provider is not None and self.backend != "onnxruntime":
            raise ValueError(
                f"the provider is {self.provider} and the backend {self.backend}; only onnxruntime has providers: "
                "choose --backend onnxruntime or leave --provider out"
            )


@dataclass(frozen=True)
class Artifacts:
    """A checkpoint and its artifacts folder."""

    checkpoint: Checkpoint
    folder: Path
    manifest: Manifest | None
    """Manifest of the folder; None if there is none, or if the backend needs none."""
    text: TextConfig = TextConfig()
    """Precision and device of the text encoders of stock pipelines."""
    provider: Provider | None = None
    """Execution provider of onnxruntime builds."""

    @cached_property
    def parity(self) -> LocalParity:
        """Parity of the builds' pictures on this machine."""
        return LocalParity(self.checkpoint, self.folder, self.text, self.provider)

    @classmethod
    def find(cls, checkpoint: Checkpoint, config: BackendConfig) -> Artifacts:
        """Find the artifacts of a checkpoint and read their manifest, if there is one.

        Raises:
            ArtifactError: The folder has artifacts of another checkpoint, or the named folder has none.
        """
        folder = config.artifacts or default_artifacts(checkpoint)
        is_there = config.artifacts is not None or (folder / MANIFEST_FILE).is_file()
        is_read = config.backend not in TORCH_BACKENDS and is_there
        manifest = load_manifest(folder, checkpoint) if is_read else None
        return cls(checkpoint, folder, manifest, config.text, config.provider)

    def is_missing(self, config: BackendConfig) -> bool:
        """Whether this backend needs artifacts and the default folder has none that runs on this machine."""
        if config.backend in TORCH_BACKENDS or config.artifacts is not None:
            return False
        if config.backend == "auto":
            builds = () if self.manifest is None else self.manifest.builds
            is_built = any(not build.elsewhere for build in builds)
            return not is_built and (gpu_architecture() is None or bool(installed(PACKAGES)))
        return self.manifest is None or self.manifest.find(config.backend, config.precision) is None

    def load(
        self, backend: BackendName, precision: Precision | None, threads: int | None, device: str | None
    ) -> LoadedModel:
        """Load one candidate.

        Raises:
            ArtifactError: It was not built, or was built for another machine, or makes poor pictures on this CPU.
            BackendError: It cannot run here.
        """
        if backend in TORCH_BACKENDS:
            on = torch.device(device) if device else None
            return load_with_torch(self.checkpoint, backend, precision or "fp32", on, threads, self.text)
        manifest, build = self.require(backend, precision)
        return load_build(self.checkpoint, manifest, build, self.folder, threads, self.text, self.provider)

    def require(self, backend: BackendName, precision: Precision | None) -> tuple[Manifest, Build]:
        """Return the manifest and the build for a backend, with its parity on this machine.

        Raises:
            ArtifactError: It was not built, or makes poor pictures on this CPU; the message says what to run.
            BackendError: It cannot run here.
        """
        build = self.manifest.find(backend, precision) if self.manifest else None
        if self.manifest is None or build is None:
            wanted = f"{backend} {precision}" if precision else backend
            raise ArtifactError(
                f"{self.checkpoint.recipe.name} was not built for {wanted}; "
                f"run `{export_command(self.checkpoint, self.folder, backend, precision)}`"
            )
        return self.manifest, replace(build, pictures=self.parity.checked(self.manifest, build))
