"""`BackendConfig`: the backend that is asked for. `Artifacts`: what `tdm-export` built of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch

from tdm_runtime.backends import TORCH_BACKENDS, TORCH_DTYPES, BackendName, Precision
from tdm_runtime.backends.machine import gpu_architecture
from tdm_runtime.checkpoint.folder import Checkpoint
from tdm_runtime.checkpoint.manifest import (
    MANIFEST_FILE,
    Build,
    Manifest,
    default_artifacts,
    export_command,
    load_manifest,
)
from tdm_runtime.errors import ArtifactError
from tdm_runtime.model.load import load_build, load_with_torch
from tdm_runtime.model.loaded_model import LoadedModel
from tdm_runtime.model.local_parity import LocalParity


@dataclass(frozen=True)
class BackendConfig:
    """What is to run a checkpoint."""

    backend: BackendName | Literal["auto"] = "torch"
    """auto measures what there is, once on a machine, and takes the fastest that keeps `MIN_PSNR_DB`."""
    precision: Precision | None = None
    """None is the backend's own: fp32 for torch, what was built first for others."""
    threads: int | None = None
    """CPU threads of a call; 0 takes the number that makes one picture soonest, None leaves torch's setting alone."""
    artifacts: Path | None = None
    """Folder that `tdm-export` wrote; None looks where it writes by default."""
    allow_fallback: bool = False
    """Run torch where the artifacts cannot be used, and say so, in place of refusing."""
    device: str | None = None
    """A torch device for torch backends; by default CUDA where there is one, else the CPU."""

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 0:
            raise ValueError(f"threads is {self.threads}; give a number of cores, or 0 to have it measured")
        if self.backend in TORCH_BACKENDS and self.precision not in (None, *TORCH_DTYPES):
            raise ValueError(f"{self.backend} does not run {self.precision}; choose {', '.join(TORCH_DTYPES)}")


@dataclass(frozen=True)
class Artifacts:
    """A checkpoint and what was built of it."""

    checkpoint: Checkpoint
    folder: Path
    manifest: Manifest | None

    @cached_property
    def parity(self) -> LocalParity:
        """Parity of the builds' pictures on this machine."""
        return LocalParity(self.checkpoint, self.folder)

    @classmethod
    def find(cls, checkpoint: Checkpoint, config: BackendConfig) -> Artifacts:
        """Read the manifest, where there is one.

        Raises:
            ArtifactError: a folder was named and holds nothing for this checkpoint.
        """
        folder = config.artifacts or default_artifacts(checkpoint)
        is_there = config.artifacts is not None or (folder / MANIFEST_FILE).is_file()
        is_read = config.backend not in TORCH_BACKENDS and is_there
        return cls(checkpoint, folder, load_manifest(folder, checkpoint) if is_read else None)

    def is_missing(self, config: BackendConfig) -> bool:
        """Whether this backend wants artifacts and the default folder has none for it."""
        if config.backend in TORCH_BACKENDS or config.artifacts is not None:
            return False
        if config.backend == "auto":
            return self.manifest is None and gpu_architecture() is None
        return self.manifest is None or self.manifest.find(config.backend, config.precision) is None

    def load(
        self, backend: BackendName, precision: Precision | None, threads: int | None, device: str | None
    ) -> LoadedModel:
        """Load one candidate.

        Raises:
            ArtifactError: it was not built, or was built for something else, or makes poor pictures on this CPU.
            BackendError: it cannot run here.
        """
        if backend in TORCH_BACKENDS:
            on = torch.device(device) if device else None
            return load_with_torch(self.checkpoint, backend, precision or "fp32", on, threads)
        manifest, build = self.require(backend, precision)
        return load_build(self.checkpoint, manifest, build, self.folder, threads)

    def require(self, backend: BackendName, precision: Precision | None) -> tuple[Manifest, Build]:
        """Return the manifest and the build for a backend, with its parity on this machine.

        Raises:
            ArtifactError: it was not built, or makes poor pictures on this CPU; says what to run.
            BackendError: it cannot run here.
        """
        build = self.manifest.find(backend, precision) if self.manifest else None
        if self.manifest is None or build is None:
            wanted = f"{backend} {precision}" if precision else backend
            raise ArtifactError(
                f"{self.checkpoint.recipe.name} was not built for {wanted}; "
                f"run `{export_command(self.checkpoint, self.folder, backend, precision)}`"
            )
        return self.manifest, replace(build, pictures=self.parity.checked(self.manifest, build))
