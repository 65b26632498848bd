"""Files of an earlier export of the same checkpoint, which the next one takes over instead of making them again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from export.onnx_export import OPSET
from tdm_runtime.backends import BackendName, Precision
from tdm_runtime.backends.interface import Interface
from tdm_runtime.backends.machine import TOOLS, installed
from tdm_runtime.checkpoint.folder import Checkpoint
from tdm_runtime.checkpoint.manifest import Build, BuiltComponent, Manifest, is_intact, load_manifest
from tdm_runtime.errors import ArtifactError
from tdm_runtime.whole_file import link_or_copy

Files = Mapping[str, str]
"""File name -> sha256."""


@dataclass(frozen=True)
class Earlier:
    """An artifacts folder that the same versions of the tools wrote for the same checkpoint."""

    folder: Path
    manifest: Manifest

    @classmethod
    def found(cls, folder: Path, checkpoint: Checkpoint) -> Earlier | None:
        """Return what is there, or None if nothing of it can be used."""
        try:
            manifest = load_manifest(folder, checkpoint)
        except ArtifactError:
            return None
        is_same = manifest.tools == installed(TOOLS) and manifest.opset == OPSET
        return cls(folder, manifest) if is_same else None

    def onnx(self, name: str, interface: Interface, to: Path) -> bool:
        """Take over a program's ONNX file. Return whether it was there, intact and for this interface."""
        is_same = self.manifest.interfaces.get(name) == interface
        return is_same and self._taken(self.manifest.onnx.get(name, {}), to)

    def ir(self, name: str, to: Path) -> bool:
        """Take over a program's OpenVINO IR, the one that is not int8. Return whether it was there and intact."""
        built = (build.components[name].files for build in self.manifest.builds if name in build.components)
        return any(f"{name}.xml" in files and self._taken(files, to) for files in built)

    def builds(self, backend: BackendName, precision: Precision, to: Path) -> list[Build]:
        """Take over builds of one target, one a GPU. Return those that are intact and run with the packages here."""
        return [
            build
            for build in self.manifest.builds
            if (build.backend, build.precision) == (backend, precision)
            and installed(build.requires) == dict(build.requires)
            and self._taken(_files(build.components), to)
        ]

    def _taken(self, files: Files, to: Path) -> bool:
        """Link files into another folder if all are intact. Return whether they are."""
        there = {self.folder / name: sha256 for name, sha256 in files.items()}
        if not there or not all(is_intact(file, sha256) for file, sha256 in there.items()):
            return False
        for file in there:
            if not (to / file.name).exists():
                link_or_copy(file, to / file.name)
        return True


def _files(components: Mapping[str, BuiltComponent]) -> Files:
    return {name: sha256 for component in components.values() for name, sha256 in component.files.items()}
