"""What `tdm-export` built and measured: `manifest.json` beside the artifacts.

Exporting writes it; serving reads it and refuses, by name, what was built for something else.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pydantic

from tdm_runtime.backends import BackendName, Precision
from tdm_runtime.backends.cpu import cpu_features
from tdm_runtime.backends.interface import Interface
from tdm_runtime.backends.machine import TOOLS, gpu_architecture, installed
from tdm_runtime.checkpoint.folder import Checkpoint, file_sha256
from tdm_runtime.errors import ArtifactError

MANIFEST_FILE = "manifest.json"
MANIFEST_FORMAT = 1


@dataclass(frozen=True)
class ComponentParity:
    """A component's output against torch float32 on the same inputs."""

    relative_l2: float
    max_abs: float


@dataclass(frozen=True)
class PictureParity:
    """Pictures against those of torch float32, same prompts and seeds."""

    psnr_db: float
    """Mean over the pictures of each one's PSNR; 99 where they are equal."""
    min_psnr_db: float
    ssim: float
    """Mean over the pictures; structural similarity, 1 where they are equal."""


@dataclass(frozen=True)
class BuiltComponent:
    """One component, compiled."""

    files: Mapping[str, str]
    """File, relative to the manifest -> sha256. The first is what the backend opens."""
    parity: ComponentParity | None = None
    """None until verified."""

    @property
    def file(self) -> str:
        return next(iter(self.files))


@dataclass(frozen=True)
class Build:
    """What one backend runs at one precision."""

    backend: BackendName
    precision: Precision
    components: Mapping[str, BuiltComponent]
    requires: Mapping[str, str]
    """Package -> the version that must be installed."""
    gpu: str | None = None
    """Compute capability it was built for, as "sm_90"; None runs on any."""
    profiles: Mapping[str, Mapping[str, tuple[int, int, int]]] = field(default_factory=dict)
    """Component -> size -> least, best and greatest that it takes; empty where every size is taken."""
    pictures: Mapping[int, PictureParity] = field(default_factory=dict)
    """Step count K -> parity of the pictures; empty until verified."""
    measured_on: tuple[str, ...] = ()
    """What decided on the kernels when the parities were measured (`kernel_choice`); empty where that is not known."""

    @property
    def name(self) -> str:
        return f"{self.backend} {self.precision}"


@dataclass(frozen=True)
class Manifest:
    """Everything in one artifacts folder."""

    checkpoint: str
    """Name of the checkpoint it was built from."""
    fingerprint: str
    """`Checkpoint.fingerprint`."""
    weights: Mapping[str, str]
    """Weight file of the checkpoint -> sha256."""
    tools: Mapping[str, str]
    """Package -> version it was built with."""
    opset: int
    interfaces: Mapping[str, Interface]
    """Component -> what it is called with."""
    onnx: Mapping[str, Mapping[str, str]]
    """Component -> its ONNX file and that of its weights -> sha256."""
    builds: tuple[Build, ...]
    format: int = MANIFEST_FORMAT

    def find(self, backend: BackendName, precision: Precision | None) -> Build | None:
        """The build for a backend; without a precision the first, which is the backend's best."""
        for build in self.builds:
            if build.backend == backend and precision in (None, build.precision):
                return build
        return None

    def save(self, folder: Path) -> None:
        """Write `folder/manifest.json`, whole or not at all."""
        text = _ADAPTER.dump_json(self, indent=2).decode() + "\n"
        partial = folder / f"{MANIFEST_FILE}.{os.getpid()}"
        partial.write_text(text, encoding="utf-8")
        partial.replace(folder / MANIFEST_FILE)


_ADAPTER = pydantic.TypeAdapter(Manifest)


def load_manifest(folder: Path, checkpoint: Checkpoint) -> Manifest:
    """Read a manifest and check that it is of this checkpoint.

    Raises:
        ArtifactError: it is missing, unreadable or of another checkpoint; says what to run.
    """
    file, remedy = folder / MANIFEST_FILE, export_command(checkpoint, folder)
    try:
        manifest = _ADAPTER.validate_json(file.read_bytes())
    except OSError as error:
        raise ArtifactError(f"{file} cannot be read ({error.strerror}); run `{remedy}`") from None
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ArtifactError(f"{file}: {where}: {first['msg']}; run `{remedy}`") from None
    if manifest.format != MANIFEST_FORMAT:
        raise ArtifactError(
            f"{file} has format {manifest.format}, this version reads {MANIFEST_FORMAT}; run `{remedy}`"
        )
    if manifest.fingerprint != checkpoint.fingerprint:
        raise ArtifactError(
            f"{folder} was built from {manifest.checkpoint} {manifest.fingerprint[:12]}, this checkpoint is "
            f"{checkpoint.recipe.name} {checkpoint.fingerprint[:12]}; run `{remedy}`"
        )
    return manifest


def check_build(manifest: Manifest, build: Build, folder: Path, checkpoint: Checkpoint) -> None:
    """Check that a build runs on this machine and that its files are those that were built.

    Raises:
        ArtifactError: naming what it was built for, what is here and what to run.
    """
    remedy = export_command(checkpoint, folder)
    here = installed(build.requires)
    wanted, found = _listed(build.requires), _listed({name: here.get(name, "not installed") for name in build.requires})
    if here != dict(build.requires):
        raise ArtifactError(
            f"{build.name} in {folder} was built for {wanted}; this machine has {found}; run `{remedy}`"
        )
    if build.gpu is not None and build.gpu != gpu_architecture():
        raise ArtifactError(
            f"{build.name} in {folder} was built for {build.gpu} with {wanted}; this machine has "
            f"{gpu_architecture() or 'no CUDA device'}; run `{remedy}`"
        )
    for component in build.components.values():
        for name, expected in component.files.items():
            if not (folder / name).is_file() or file_sha256(folder / name) != expected:
                raise ArtifactError(f"{folder / name} is damaged or missing; run `{remedy}`")


def kernel_choice(build: Build) -> tuple[str, ...]:
    """What decides which kernels run a build on this machine: the GPU's architecture, or the CPU's features."""
    gpu = gpu_architecture()
    return (gpu,) if gpu and build.backend in ("onnxruntime", "tensorrt") else cpu_features()


def default_artifacts(checkpoint: Checkpoint) -> Path:
    """Where artifacts are kept when no folder is named.

    The folder's name holds a hash of all that may change what is built (weights, configs, tools, GPU), so that
    what is found there is never stale.
    """
    key = {"fingerprint": checkpoint.fingerprint, "format": str(MANIFEST_FORMAT), "gpu": gpu_architecture() or ""}
    digest = hashlib.sha256(_listed(key | installed(TOOLS)).encode()).hexdigest()
    return user_cache() / f"{checkpoint.recipe.name}-{digest[:16]}"


def user_cache() -> Path:
    """Where this project keeps what can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tdm-serve"


def export_command(
    checkpoint: Checkpoint, folder: Path, backend: BackendName | None = None, precision: Precision | None = None
) -> str:
    """What a user runs to build the artifacts anew, or to add a backend to them."""
    output = "" if folder == default_artifacts(checkpoint) else f" --output {folder}"
    target = (f" --backend {backend}" if backend else "") + (f" --precision {precision}" if precision else "")
    return f"tdm-export {checkpoint.folder}{output}{target}"


def _listed(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
