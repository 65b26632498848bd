"""Parity of builds on this machine: as exported, or measured again if the CPU has other features or on a GPU."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pydantic

from tdm_runtime.backends import BackendName, Precision, Provider
from tdm_runtime.backends.machine import TOOLS, gpu_name, installed
from tdm_runtime.checkpoint.folder import Checkpoint
from tdm_runtime.checkpoint.manifest import Build, Manifest, PictureParity, kernel_choice, user_cache
from tdm_runtime.checkpoint.stock.text_precision import TextConfig
from tdm_runtime.errors import ArtifactError
from tdm_runtime.model.load import load_build, load_with_torch
from tdm_runtime.model.loaded_model import LoadedModel
from tdm_runtime.model.parity import (
    ParityConfig,
    Pictures,
    lowest_psnr_db,
    min_psnr_db,
    picture_parity,
    reference_pictures,
)
from tdm_runtime.whole_file import write_whole

BUDGET_S = 20.0
"""Seconds after which no further prompt is begun, because a server is starting."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class KeptParity:
    """Parity of one build, measured on CPUs with one set of features."""

    build: str
    """What was measured, for people."""
    measured_on: tuple[str, ...]
    """`kernel_choice` of the machine, or the name of its GPU."""
    pictures: Mapping[int, PictureParity]
    """Step count K -> parity."""


_ADAPTER = pydantic.TypeAdapter(KeptParity)


class LocalParity:
    """Parity of a folder's builds on this machine."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        folder: Path,
        text: TextConfig = TextConfig(),
        provider: Provider | None = None,
    ) -> None:
        """
        Args:
            text: How text encoders of stock pipelines run on both sides, so that each is loaded once.
            provider: Execution provider of onnxruntime builds; None is their default.
        """
        self._provider = provider
        self._text = text
        self._checkpoint = checkpoint
        self._folder = folder
        self._found: dict[str, Mapping[int, PictureParity]] = {}

    def of(self, manifest: Manifest, build: Build) -> Mapping[int, PictureParity]:
        """Return the parity of a build's pictures on this machine.

        The manifest's figures count if they were measured on a CPU like this one. Otherwise parity is measured once and
        kept beside the artifacts, or in the user's cache if the folder is read-only.

        Raises:
            ArtifactError, BackendError: The build cannot run here.
        """
        here = kernel_choice(build)
        if _is_measured_on(build, here):
            return build.pictures
        name = f"parity-{self._key(build, here)}.json"
        if name not in self._found:
            self._found[name] = self._read(name) or self._measure(
                f"{build.name} in {self._folder}",
                here,
                name,
                lambda: load_build(
                    self._checkpoint, manifest, build, self._folder, text=self._text, provider=self._provider
                ),
            )
        return self._found[name]

    def of_torch(self, backend: BackendName, precision: Precision) -> Mapping[int, PictureParity]:
        """Return the parity of one of torch's own backends on this machine's GPU. It is measured once and kept.

        Raises:
            BackendError: It cannot run here.
        """
        here, title = (gpu_name(),), f"{backend} {precision}"
        what = json.dumps([self._checkpoint.fingerprint, title, installed(TOOLS), here])
        name = f"parity-{hashlib.sha256(what.encode()).hexdigest()[:16]}.json"
        if name not in self._found:
            self._found[name] = self._read(name) or self._measure(
                title, here, name, lambda: load_with_torch(self._checkpoint, backend, precision, text=self._text)
            )
        return self._found[name]

    def checked(self, manifest: Manifest, build: Build) -> Mapping[int, PictureParity]:
        """Return the parity of a build that is requested by name.

        Raises:
            ArtifactError: Its pictures are poor on this CPU, or it was built for another machine.
            BackendError: The build cannot run here.
        """
        pictures = self.of(manifest, build)
        if _is_measured_on(build, kernel_choice(build)):
            return pictures  # `tdm-export` showed its user this parity
        lowest, floor = lowest_psnr_db(pictures), min_psnr_db(build.precision)
        if lowest < floor:
            raise ArtifactError(
                f"pictures of {build.name} in {self._folder} reach {lowest:.1f} dB on this CPU, below {floor:g} dB "
                f"({_exported(build)}); choose another --precision or --backend auto"
            )
        return pictures

    @cached_property
    def _reference(self) -> Pictures:
        return reference_pictures(self._checkpoint, ParityConfig(budget_s=BUDGET_S), self._text)

    @property
    def _folders(self) -> tuple[Path, ...]:
        return (self._folder, user_cache() / "parity")

    def _key(self, build: Build, here: tuple[str, ...]) -> str:
        """Return a hash of all that may change the pictures."""
        files = {name: dict(component.files) for name, component in build.components.items()}
        what = [self._checkpoint.fingerprint, build.name, files, dict(build.requires), here]
        what += [self._provider] if self._provider else []
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]

    def _read(self, name: str) -> Mapping[int, PictureParity] | None:
        for folder in self._folders:
            try:
                return _ADAPTER.validate_json((folder / name).read_bytes()).pictures or None
            except (OSError, pydantic.ValidationError):
                continue
        return None

    def _measure(
        self, title: str, here: tuple[str, ...], name: str, load: Callable[[], LoadedModel]
    ) -> Mapping[int, PictureParity]:
        """Measure one backend.

        Args:
            title: what it is, for people.
            name: file that keeps the result.
        """
        logger.warning(
            "%s was not measured on a machine like this one; comparing its pictures with torch fp32 once", title
        )
        with ThreadPoolExecutor(1) as passing:  # torch's OpenMP workers end with this thread
            passing.submit(lambda: self._reference).result()  # made before the build is loaded: both may not fit
            model = load()
            pictures = passing.submit(lambda: picture_parity(self._reference, model)).result()
        self._keep(KeptParity(title, here, pictures), name)
        return pictures

    def _keep(self, parity: KeptParity, name: str) -> None:
        content = _ADAPTER.dump_json(parity, indent=2)
        for folder in self._folders:
            with contextlib.suppress(OSError):
                folder.mkdir(parents=True, exist_ok=True)
                write_whole(folder / name, content)
                return
        logger.warning("neither %s nor %s can be written: parity is measured at every start", *self._folders)


def _is_measured_on(build: Build, here: tuple[str, ...]) -> bool:
    return bool(build.pictures) and build.measured_on == here


def _exported(build: Build) -> str:
    if not build.pictures:
        return "not measured where it was exported"
    return f"{lowest_psnr_db(build.pictures):.1f} dB where it was exported"
