"""Manifest of an artifacts folder, `manifest.json`: what `tdm-export` built, for what, and the measured parity.

Export writes it. Serving reads it and refuses builds for another checkpoint, version or machine.
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
from tdm_runtime.backends.openvino import has_bf16
from tdm_runtime.checkpoint.file_hashes import file_sha256
from tdm_runtime.checkpoint.folder import Checkpoint
from tdm_runtime.errors import ArtifactError
from tdm_runtime.whole_file import write_whole

MANIFEST_FILE = "manifest.json"
MANIFEST_FORMAT = 2
"""Format that this version reads and writes."""


@dataclass(frozen=True)
class ComponentParity:
    """Error of a component's output against torch float32 on the same inputs."""

    relative_l2: float
    max_abs: float
    """Largest absolute error; in levels for pixels."""


@dataclass(frozen=True)
class PictureParity:
    """Similarity of pictures to those of torch float32 with the same prompts and seeds."""

    psnr_db: float
    """Mean PSNR; 99 for equal pictures."""
    min_psnr_db: float
    """Lowest PSNR of a picture."""
    ssim: float
    """Mean structural similarity; 1 for equal pictures."""


@dataclass(frozen=True)
class BuiltComponent:
    """A compiled component."""

    files: Mapping[str, str]
    """File, relative to the manifest -> sha256. The backend opens the first."""
    parity: ComponentParity | None = None
    """Parity; None until verified."""

    @property
    def file(self) -> str:
        return next(iter(self.files))


@dataclass(frozen=True)
class Build:
    """Programs of one backend at one precision."""

    backend: BackendName
    precision: Precision
    components: Mapping[str, BuiltComponent]
    requires: Mapping[str, str]
    """Package -> version that must be installed."""
    gpu: str | None = None
    """Compute capability that it was built for, such as "sm_90"; None: any machine."""
    profiles: Mapping[str, Mapping[str, tuple[int, int, int]]] = field(default_factory=dict)
    """Component -> dimension -> smallest, best and largest value; empty if any size runs."""
    pictures: Mapping[int, PictureParity] = field(default_factory=dict)
    """Step count K -> parity of the pictures; empty until verified."""
    measured_on: tuple[str, ...] = ()
    """`kernel_choice` of the machine that measured the parities; empty if unknown."""

    @property
    def name(self) -> str:
        return f"{self.backend} {self.precision}"

    @property
    def elsewhere(self) -> str | None:
        """What it was built for, if this machine has it not: a GPU, or a CPU with bf16; else None."""
        if self.gpu is not None:
            return self.gpu if self.gpu != gpu_architecture() else None
        needs_bf16 = self.backend == "openvino" and self.precision == "bf16"
        return "a CPU with bf16" if needs_bf16 and not has_bf16() else None


@dataclass(frozen=True)
class Manifest:
    """Content of one artifacts folder."""

    checkpoint: str
    """Name of the checkpoint that it was built from."""
    fingerprint: str
    """`Checkpoint.fingerprint` of that checkpoint."""
    weights: Mapping[str, str]
    """Weight file of the checkpoint -> sha256."""
    tools: Mapping[str, str]
    """Package -> version that built it."""
    opset: int
    """ONNX opset."""
    interfaces: Mapping[str, Interface]
    """Component -> inputs and output."""
    onnx: Mapping[str, Mapping[str, str]]
    """Component -> ONNX file and weights file -> sha256."""
    builds: tuple[Build, ...]
    format: int = MANIFEST_FORMAT

    def find(self, backend: BackendName, precision: Precision | None) -> Build | None:
        """Return the build for a backend, or None. Without a precision it is the first, which is the backend's best.

        Of builds for several GPUs it is the one for this machine's, if there is one.
        """
        found = [build for build in self.builds if build.backend == backend and precision in (None, build.precision)]
        return next((build for build in found if not build.elsewhere), next(iter(found), None))

    def save(self, folder: Path) -> None:
        """Write `folder/manifest.json` atomically."""
        write_whole(folder / MANIFEST_FILE, _ADAPTER.dump_json(self, indent=2) + b"\n")


_ADAPTER = pydantic.TypeAdapter(Manifest)


def load_manifest(folder: Path, checkpoint: Checkpoint) -> Manifest:
    """Read a manifest and check that it belongs to this checkpoint.

    Raises:
        ArtifactError: It is missing, unreadable or of another checkpoint; the message says what to run.
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
            f"{file} has format {manifest.format}, but this version reads {MANIFEST_FORMAT}; run `{remedy}`"
        )
    if manifest.fingerprint != checkpoint.fingerprint:
        raise ArtifactError(
            f"{folder} was built from {manifest.checkpoint} {manifest.fingerprint[:12]}, but this checkpoint is "
            f"{checkpoint.recipe.name} {checkpoint.fingerprint[:12]}; run `{remedy}`"
        )
    return manifest


def check_build(manifest: Manifest, build: Build, folder: Path, checkpoint: Checkpoint) -> None:
    """Check that a build runs on this machine and that its files are intact.

    Raises:
        ArtifactError: It names the versions or the GPU that the build needs, those found here, and what to run.
    """
    remedy = export_command(checkpoint, folder)
    here = installed(build.requires)
    wanted, found = _listed(build.requires), _listed({name: here.get(name, "not installed") for name in build.requires})
    if here != dict(build.requires):
        raise ArtifactError(
            f"{build.name} in {folder} was built for {wanted}; this machine has {found}; run `{remedy}`"
        )
    if build.gpu and build.elsewhere:
        raise ArtifactError(
            f"{build.name} in {folder} was built for {build.gpu} with {wanted}; this machine has "
            f"{gpu_architecture() or 'no CUDA device'}; run `{remedy}`"
        )
    for component in build.components.values():
        for name, expected in component.files.items():
            if not is_intact(folder / name, expected):
                raise ArtifactError(f"{folder / name} is damaged or missing; run `{remedy}`")


def is_intact(file: Path, sha256: str) -> bool:
    """Return whether a file is there and has this hash."""
    return file.is_file() and file_sha256(file) == sha256


def kernel_choice(build: Build) -> tuple[str, ...]:
    """Return what decides which kernels run a build here: the GPU's architecture or the CPU's features."""
    gpu = gpu_architecture()
    return (gpu,) if gpu and build.backend in ("onnxruntime", "tensorrt") else cpu_features()


def default_artifacts(checkpoint: Checkpoint) -> Path:
    """Return the default folder of a checkpoint's artifacts.

    Its name has a hash of all that may change them (weights, configs, tools, GPU), so they are never stale.
    """
    key = {"fingerprint": checkpoint.fingerprint, "format": str(MANIFEST_FORMAT), "gpu": gpu_architecture() or ""}
    digest = hashlib.sha256(_listed(key | installed(TOOLS)).encode()).hexdigest()
    return user_cache() / f"{checkpoint.recipe.name}-{digest[:16]}"


def user_cache() -> Path:
    """Return the folder for files that can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tdm-serve"


def export_command(
    checkpoint: Checkpoint, folder: Path, backend: BackendName | None = None, precision: Precision | None = None
) -> str:
    """Return the command that builds the artifacts again, or adds a backend to them."""
    output = "" if folder == default_artifacts(checkpoint) else f" --output {folder}"
    target = (f" --backend {backend}" if backend else "") + (f" --precision {precision}" if precision else "")
    return f"tdm-export {checkpoint.folder}{output}{target}"


def _listed(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
